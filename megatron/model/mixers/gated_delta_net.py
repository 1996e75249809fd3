"""Gated delta net (arXiv:2412.06464) in place of the attention of a block, whose norms and MLP are those of any block.

One projection gives queries, keys, values, the gate of the output, and for each value head a strength and a decay.
Queries, keys and values go through a short causal convolution with silu; queries and keys get length 1. The state of
each head is corrected towards the values (kernels/gated_delta.py). Its output is normalised head by head and multiplied
by silu of the gate.

A key head has the same number of value heads, which are beside each other. Tensor-parallel ranks have whole key heads
with their value heads, so that the sum over ranks is that of the last projection, as in attention.

Shapes: s sequence on this rank, b micro batch, h hidden, t tensor-parallel degree; of all ranks m key heads, n value
heads, k width of a key, v width of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.param_init import ParamFactory
from megatron.distributed.partial_grads import mark_partial_grad
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import Regather
from megatron.kernels.gated_delta import DeltaInputs
from megatron.kernels.scan import causal_convolution
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.mixers.short_convolution import ShortConvolution

RATES = (0.01, 16.0)
"""Rates of decay start uniform in this range."""
LENGTH_EPSILON = 1e-6
"""Added to the squared length of queries and keys."""


class GatedDeltaNet(nn.Module):
    """The mixer of block ``number`` (from 0). ValueError if key heads do not divide by the tensor-parallel degree."""

    zero3_gather_together = True

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        sizes, hidden, ranks = spec.dims.mixers.delta, spec.dims.hidden_size, source.axis.size
        if sizes.key_heads % ranks:
            raise ValueError(f"{sizes.key_heads} key heads do not divide by {ranks} tensor-parallel ranks")
        self.number, self.sizes = number, sizes
        self.reset, self.shards, self.states = spec.reset_attention, spec.shards, spec.states
        self.convolve, self.rule = spec.kernels.mamba.convolution, spec.kernels.gated_delta
        self.A_log = source.sharded("A_log", (sizes.value_heads,), _init_a_log, dim=0)
        self.dt_bias = source.sharded("dt_bias", (sizes.value_heads,), _ones, dim=0)
        self.in_proj = ColumnParallelLinear(
            hidden,
            sum(sizes.projected),
            source.of("in_proj"),
            init_fn=spec.init_fn,
            bias=False,
            sections=sizes.projected,
            kernel=spec.kernels.linear,
            lora=spec.lora_specs.get("in_proj"),
        )
        self.conv1d = ShortConvolution(
            sum(sizes.mixed), sizes.convolution, source.of("conv1d"), bias=False, sections=sizes.mixed
        )
        self.norm = GatedHeadNorm(sizes.value, sizes.epsilon, source.of("norm"))
        self.dense = RowParallelLinear(
            sizes.value_size,
            hidden,
            source.of("dense"),
            init_fn=spec.output_init_fn,
            bias=False,
            kernel=spec.kernels.linear,
            lora=spec.lora_specs.get("dense"),
        )
        self.parts = [sum(sizes.mixed) // ranks, *(width // ranks for width in sizes.projected[3:])]
        self.mixed = [width // ranks for width in sizes.mixed]

    def forward(self, x: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h], equal on all ranks."""
        regather = Regather.of(self.dense.axis)
        return self.dense(self.inner(x, cache, document_starts, regather), regather)

    def inner(
        self,
        x: Tensor,
        cache: KVCache | None,
        document_starts: Tensor | None = None,
        regather: Regather | None = None,
    ) -> Tensor:
        """[s, b, h] -> the input of ``dense`` [s, b, n/t * v].

        Args:
            x: input of the block's mixer.
            cache: states of earlier positions, or None.
            document_starts: position at which each token's document starts [b, s], or None.
            regather: of the region that the caller ends.
        """
        projected = self.in_proj(x, regather).transpose(0, 1)  # [b, s, ...]
        mixed, gate, strength, step = projected.split(self.parts, dim=-1)
        starts = self.shards.shard_starts(document_starts) if self.reset and document_starts is not None else None
        if cache is None and starts is None and not self.states.active:
            mixed = self.convolve(mixed, self.conv1d.taps, None)
        else:
            before = self.conv1d.inputs_before(mixed, self.number, cache, self.states)
            mixed = F.silu(causal_convolution(mixed, self.conv1d.taps, None, before, starts))
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = mixed.split(self.mixed, dim=-1)
        q, k = (_of_length_one(part.unflatten(-1, (-1, self.sizes.key)).to(wide)) for part in (q, k))
        inputs = DeltaInputs(
            q * self.sizes.key**-0.5,
            k,
            v.unflatten(-1, (-1, self.sizes.value)),
            -self.A_log.to(wide).exp() * F.softplus(step.to(wide) + self.dt_bias.to(wide)),
            strength.sigmoid(),
        )
        y = self._mix(inputs, cache, starts)  # [b, s, n/t, v]
        y = self.norm(y, gate.unflatten(-1, (-1, self.sizes.value)))
        return y.transpose(0, 1).flatten(2)  # [s, b, n/t * v]

    def linear_layers(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Returns the layers that Transformer Engine and FP8 may compute: none."""
        return []

    def _mix(self, x: DeltaInputs, cache: KVCache | None, starts: Tensor | None) -> Tensor:
        """Returns what the heads give, [b, s, n/t, v].

        Args:
            x: inputs of every position.
            cache: states of earlier positions, or None.
            starts: first position that each position sees [b, s], or None.
        """
        if cache is not None:
            state = cache.state(self.number, "state")
            y, last = self.rule(x, state, starts, cache.valid_mask(x.k.shape[1]))
            state.copy_(last)
            return y
        if not self.states.active:
            return self.rule(x, None, starts, None)[0]
        shape = (x.v.shape[0], x.v.shape[2], self.sizes.key, self.sizes.value)
        y, last = self.rule(x, self.states.receive(x.k, *shape, dtype=x.k.dtype), starts, None)
        return self.states.send(y, last)


class GatedHeadNorm(nn.Module):
    """RMS norm of every value head, times silu of the gate, in fp32; its ``scale`` is that of all heads."""

    def __init__(self, width: int, epsilon: float, source: ParamFactory) -> None:
        super().__init__()
        self.scale = source.replicated("scale", (width,), _ones, full_sequence=True)
        self.epsilon = epsilon
        if source.axis.size > 1:
            mark_partial_grad(self.scale, source.axis)

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """[..., v] and the gate [..., v], whose type it returns."""
        y = F.rms_norm(y, self.scale.shape, self.scale.to(y.dtype), self.epsilon)
        return (y * F.silu(gate.to(y.dtype))).to(gate.dtype)


def _of_length_one(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPSILON)


def _init_a_log(tensor: Tensor, generator: torch.Generator) -> None:
    """Logarithms of uniform rates."""
    tensor.uniform_(*RATES, generator=generator).log_()


def _ones(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.fill_(1)
