"""The gMLP block and the aMLP block (arXiv:2105.08050): x + output(unit(activation(input(norm(x))))).

The unit splits its input in two. One half is normalized, mixed over the positions of the sequence by a causal learned
matrix, and multiplies the other half. An aMLP adds a small attention of one head, on the normalized input of the block,
to the multiplier (section 4.3).

Features are sharded over tensor-parallel ranks, positions are not: every rank mixes its features with the same matrix.
The norm needs all features of the half, so these are gathered for it.

Shapes: s sequence, b micro batch, h hidden, f features of a half, p positions of the matrix, a width of the small
attention, t tensor-parallel degree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.adapter_config import GMLP
from megatron.distributed.collectives import copy_to, gather_from, scatter_to
from megatron.distributed.param_init import ParamFactory, zeros
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import gather_twice
from megatron.model.block import Block
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache


class GMLPTransformerBlock(Block):
    """gMLP or aMLP block ``number`` (from 0)."""

    zero3_gather_together = True

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(spec, source.axis)
        self.axis, hidden, width = source.axis, spec.dims.hidden_size, spec.dims.mixers.gmlp_width
        kernel, lora = spec.kernels.linear, spec.lora_specs.get(GMLP)
        self.norm = spec.norm()
        self.input_linear = ColumnParallelLinear(
            hidden,
            2 * width,
            source.of("input_linear"),
            init_fn=spec.init_fn,
            bias=True,
            sections=(width, width),
            kernel=kernel,
            lora=lora,
            full_sequence=True,
        )
        self.activation = spec.activation
        self.sgu = SpatialGatingUnit(number, spec, source.of("sgu"))
        self.output_linear = RowParallelLinear(
            width,
            hidden,
            source.of("output_linear"),
            init_fn=spec.output_init_fn,
            bias=True,
            kernel=kernel,
            lora=lora,
        )
        self.to(spec.dtype)

    def forward(self, hidden: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        block_input, inside = gather_twice(self.norm(hidden), self.axis)  # [s, b, h]
        inner = self.activation(self.input_linear.of_gathered(block_input, inside))  # [s, b, 2f/t]
        gated = self.sgu(inner.transpose(0, 1), block_input.transpose(0, 1), cache, document_starts)
        return self.add(hidden, self.output_linear(gated.transpose(0, 1)))


class SpatialGatingUnit(nn.Module):
    """Multiplies one half of the features by the other one, mixed over positions."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        dims = spec.dims.mixers
        self.number, self.axis, self.reset = number, source.axis, spec.reset_attention
        self.norm = spec.norm_of(dims.gmlp_width)
        self.proj = _PositionMixing(dims.gmlp_positions, source.of("proj"))
        small = spec.dims.kind(number) == "amlp"
        self.attn = TinyAttention(number, spec, source.of("attn")) if small else None

    def forward(self, x: Tensor, block_input: Tensor, cache: KVCache | None, document_starts: Tensor | None) -> Tensor:
        """Mixes positions: [b, s, 2f/t] -> [b, s, f/t].

        Args:
            x: The two halves, values and gates.
            block_input: Normed input of the block [b, s, h].
            cache: Gates of earlier positions, in generation.
            document_starts: First position of each token's document [b, s].
        """
        plain, gate = x.chunk(2, dim=-1)
        gate = scatter_to(self.norm(gather_from(gate, self.axis)), self.axis)
        visible = VisiblePositions.of(x.shape[1], cache, document_starts if self.reset else None, x.device)
        if cache is not None:
            gate = visible.store(cache.state(self.number, "gate"), gate)
        mix = visible.mix(copy_to(self.proj.weight, self.axis), copy_to(self.proj.bias, self.axis), gate)
        if self.attn is not None:
            mix = mix + self.attn(block_input, visible, cache)
        return plain * mix


class TinyAttention(nn.Module):
    """Attention of one head, without positions: [b, s, h] -> [b, s, f/t]."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        dims, hidden = spec.dims.mixers, spec.dims.hidden_size
        self.number, self.axis, self.width = number, source.axis, dims.gmlp_attention
        self.proj_qkv = _ReplicatedLinear(hidden, 3 * self.width, source.of("proj_qkv"), spec)
        self.proj_ffn = _ShardedLinear(self.width, dims.gmlp_width, source.of("proj_ffn"), spec)

    def forward(self, x: Tensor, visible: VisiblePositions, cache: KVCache | None) -> Tensor:
        """Computes the attention alike on every rank, and this rank's shard of the output."""
        q, k, v = self.proj_qkv(x).chunk(3, dim=-1)  # [b, s, a]
        if cache is not None:
            k = visible.store(cache.state(self.number, "keys"), k)
            v = visible.store(cache.state(self.number, "values"), v)
        scores = q @ k.transpose(1, 2) * self.width**-0.5  # [b, s, positions]
        weights = scores.float().masked_fill(~visible.seen, float("-inf")).softmax(dim=-1).to(v.dtype)
        return self.proj_ffn(copy_to(weights @ v, self.axis))


class VisiblePositions:
    """The positions that new positions see. at: new positions [b or 1, s]. seen: [b or 1, s, positions]."""

    def __init__(self, at: Tensor, seen: Tensor) -> None:
        self.at, self.seen = at, seen

    @staticmethod
    def of(length: int, cache: KVCache | None, starts: Tensor | None, device: torch.device) -> VisiblePositions:
        """Creates it for positions after a cache, or for a full sequence.

        Args:
            length: Number of new positions.
            cache: Earlier positions, in generation.
            starts: First position of each token's document [b, s].
            device: Device of the result.
        """
        first = torch.zeros(1, 1, dtype=torch.long, device=device)
        if cache is not None:
            first = torch.tensor(cache.lengths, device=device).unsqueeze(1)
        at = first + torch.arange(length, device=device)  # [b, s]
        positions = torch.arange(length if cache is None else cache.length + length, device=device)
        seen = positions <= at.unsqueeze(-1)
        return VisiblePositions(at, seen if starts is None else seen & (positions >= starts.unsqueeze(-1)))

    def store(self, memory: Tensor, new: Tensor) -> Tensor:
        """Stores [b, s, ...] at the new positions of the memory [b, max, ...]; returns all positions so far, in its
        type.
        """
        rows = torch.arange(len(new), device=new.device).unsqueeze(1)
        memory[rows, self.at.expand(len(new), -1)] = new.to(memory.dtype)
        return memory[:, : self.seen.shape[-1]].to(new.dtype)

    def mix(self, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        """Applies weight [p, p] and bias [p] to gate [b, positions, f/t] -> [b, s, f/t]."""
        rows = weight[self.at][..., : self.seen.shape[-1]].masked_fill(~self.seen, 0)  # [b or 1, s, positions]
        return rows @ gate + bias[self.at].unsqueeze(-1)


class _PositionMixing(nn.Module):
    """``weight`` [p, p] of zeros and ``bias`` [p] of ones: initially the unit passes one half on (section 2.1)."""

    def __init__(self, positions: int, source: ParamFactory) -> None:
        super().__init__()
        self.weight = source.replicated("weight", (positions, positions), zeros, full_sequence=True)
        self.bias = source.replicated("bias", (positions,), _ones, full_sequence=True)


class _ReplicatedLinear(nn.Module):
    """A linear layer that is replicated on every rank and applied to full sequences."""

    def __init__(self, inp: int, out: int, source: ParamFactory, spec: BlockSpec) -> None:
        super().__init__()
        self.weight = source.replicated("weight", (out, inp), spec.init_fn, full_sequence=True)
        self.bias = source.replicated("bias", (out,), zeros, full_sequence=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _ShardedLinear(nn.Module):
    """A linear layer with sharded outputs, whose input is already in the tensor-parallel region."""

    def __init__(self, inp: int, out: int, source: ParamFactory, spec: BlockSpec) -> None:
        super().__init__()
        self.weight = source.sharded("weight", (out, inp), spec.init_fn, dim=0)
        self.bias = source.sharded("bias", (out,), zeros, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _ones(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.fill_(1)
