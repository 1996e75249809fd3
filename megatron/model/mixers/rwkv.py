"""The RWKV-6 block (arXiv:2404.05892): time mixing instead of attention, channel mixing instead of an MLP.

Both interpolate a token with the one before it, in learned proportions (which depend on the token in time mixing). Time
mixing then runs a linear attention with a decaying state; see kernels/wkv.py.

Names, sizes and initial values are those of the public layout: layernorms ``ln1`` and ``ln2``, ``att`` and ``ffn``;
block 0 applies ``ln1`` to its input first. Heads and inner widths are sharded over tensor-parallel ranks. Inputs of a
sharded product are computed alike on all of them from full sequences.

Shapes: s sequence, b micro batch, h hidden, n heads of this rank, d head dim, a = n d, t tensor-parallel degree.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.adapter_config import CHANNEL_MIXING, TIME_MIXING
from megatron.distributed.collectives import copy_to, gather_from, reduce_from
from megatron.distributed.param_attrs import mark_no_weight_decay
from megatron.distributed.param_init import InitFn, ParamFactory
from megatron.distributed.partial_grads import mark_partial_grad
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import gather_twice, scatter_to_sequence_parallel
from megatron.kernels.wkv import wkv
from megatron.model.block import Block
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.norms.layernorm import LayerNorm
from megatron.param_table.mixers import RWKV_DECAY_RANK, RWKV_MIX_RANK

EPSILON = 1e-5
GROUP_EPSILON = 64e-5
"""Epsilon of the norm of every head: 1e-5 times 8 squared, as in the public code."""


class RWKVTransformerBlock(Block):
    """RWKV block ``number`` (from 0)."""

    zero3_gather_together = True

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(spec, source.axis)
        self.first = number == 0
        self.ln1, self.ln2 = (_norm(spec, source) for _ in range(2))
        self.att = TimeMixing(number, spec, source.of("att"))
        self.ffn = ChannelMixing(number, spec, source.of("ffn"))
        self.to(spec.dtype)

    def forward(self, hidden: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        if self.first:
            hidden = self.ln1(hidden)
        hidden = self.add(hidden, self.att(self.ln1(hidden), cache, document_starts))
        return self.add(hidden, self.ffn(self.ln2(hidden), cache, document_starts))


class TimeMixing(nn.Module):
    """Linear attention with a decaying state. ValueError if heads do not divide by the tensor-parallel degree."""

    time_maa_x: nn.Parameter
    time_maa_w: nn.Parameter
    time_maa_k: nn.Parameter
    time_maa_v: nn.Parameter
    time_maa_r: nn.Parameter
    time_maa_g: nn.Parameter

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        dims, hidden = spec.dims, spec.dims.hidden_size
        width, self.head = dims.mixers.rwkv_attention, dims.mixers.rwkv_head
        self.number, self.axis = number, source.axis
        self.shift, self.states = _Shift(number, "time", spec), spec.states
        depth = _DepthInit(number, dims.num_layers)
        powers = {"x": 1.0, "w": 1.0, "k": 1.0, "v": 1.0, "r": 0.5, "g": 0.5}
        for part, power in powers.items():
            start = depth.mixing(power, less=0.3 if part == "v" else 0.0)
            self.register_parameter(f"time_maa_{part}", _vector(source, f"time_maa_{part}", hidden, start))
        self.time_maa_w1 = _replicated(source, "time_maa_w1", (hidden, 5 * RWKV_MIX_RANK))
        self.time_maa_w2 = _replicated(source, "time_maa_w2", (5, RWKV_MIX_RANK, hidden))
        self.time_decay = source.sharded("time_decay", (1, 1, width), depth.decay, dim=2)
        self.time_decay_w1 = _replicated(source, "time_decay_w1", (hidden, RWKV_DECAY_RANK))
        self.time_decay_w2 = source.sharded("time_decay_w2", (RWKV_DECAY_RANK, width), _small, dim=1)
        self.time_faaaa = source.sharded("time_faaaa", (width // self.head, self.head), depth.bonus, dim=0)
        mark_no_weight_decay(self.time_decay)
        mark_no_weight_decay(self.time_faaaa)
        self.receptance, self.key, self.value = (
            _column(hidden, width, source.of(name), spec, TIME_MIXING) for name in ("receptance", "key", "value")
        )
        self.output = _row(width, hidden, source.of("output"), spec, TIME_MIXING)
        self.gate = _column(hidden, width, source.of("gate"), spec, TIME_MIXING)
        self.ln_x = _HeadNorm(width, self.head, source.of("ln_x"))

    def forward(self, x: Tensor, cache: KVCache | None, document_starts: Tensor | None) -> Tensor:
        """[s, b, h] -> [s, b, h], equal on all ranks (with sequence parallelism [s/t, b, h])."""
        x, _ = gather_twice(x, self.axis)
        x = x.transpose(0, 1)  # [b, s, h]
        change, starts, valid = self.shift(x, cache, document_starts)
        mixed, faded = self._mixed(x, change)
        inside = copy_to(mixed, self.axis)
        r, k, v, g = (layer.of_gathered(*each) for layer, *each in zip(self._layers, mixed, inside, strict=True))
        decay = self.time_decay + faded @ self.time_decay_w2  # [b, s, a]
        log_decay = -torch.exp(decay.float() if decay.dtype != torch.float64 else decay)
        r, k, v, log_decay = (one.unflatten(-1, (-1, self.head)) for one in (r, k, v, log_decay))  # [b, s, n, d]
        state = None if cache is None else cache.state(self.number, "state")
        if valid is not None:  # padding neither adds to the state nor decays it
            k, log_decay = k * valid[..., None, None], log_decay * valid[..., None, None]
        passes = cache is None and self.states.active
        if passes:
            wide = torch.promote_types(r.dtype, torch.float32)
            state = self.states.receive(r, len(r), r.shape[2], self.head, self.head, dtype=wide)
        y, last = wkv(r, k, v, log_decay, self.time_faaaa, state, starts)
        if passes:
            y = self.states.send(y, last)
        elif state is not None:
            state.copy_(last)
        y = self.ln_x(y.to(x.dtype)) * F.silu(g)
        return self.output(y.transpose(0, 1))

    def _mixed(self, x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inputs of receptance, key, value and gate [4, b, s, h], and that of the decay after its first
        product.
        """
        low = torch.tanh((x + change * self.time_maa_x) @ self.time_maa_w1)  # [b, s, 5 * rank]
        more = torch.einsum("bsir,irh->ibsh", low.unflatten(-1, (5, -1)), self.time_maa_w2)
        starts = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        w, k, v, r, g = (x + change * (start + one) for start, one in zip(starts, more, strict=True))
        faded = copy_to(torch.tanh(w @ self.time_decay_w1), self.axis)
        return torch.stack((r, k, v, g)), faded

    @property
    def _layers(self) -> tuple[ColumnParallelLinear, ...]:
        return self.receptance, self.key, self.value, self.gate


class ChannelMixing(nn.Module):
    """sigmoid(receptance(r)) * value(relu(key(k))²), where r and k interpolate a token with the one before."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        hidden, width = spec.dims.hidden_size, spec.dims.mixers.rwkv_ffn
        self.axis = source.axis
        self.shift = _Shift(number, "channel", spec)
        start = _DepthInit(number, spec.dims.num_layers).mixing(1.0)
        self.time_maa_k = _vector(source, "time_maa_k", hidden, start)
        self.time_maa_r = _vector(source, "time_maa_r", hidden, start)
        self.key = _column(hidden, width, source.of("key"), spec, CHANNEL_MIXING)
        self.receptance = _column(hidden, hidden, source.of("receptance"), spec, CHANNEL_MIXING)
        self.value = _row(width, hidden, source.of("value"), spec, CHANNEL_MIXING)

    def forward(self, x: Tensor, cache: KVCache | None, document_starts: Tensor | None) -> Tensor:
        """[s, b, h] -> [s, b, h], equal on all ranks (with sequence parallelism [s/t, b, h])."""
        x, _ = gather_twice(x, self.axis)
        x = x.transpose(0, 1)  # [b, s, h]
        change, _, _ = self.shift(x, cache, document_starts)
        mixed = torch.stack((x + change * self.time_maa_k, x + change * self.time_maa_r))
        inside = copy_to(mixed, self.axis)
        inner = torch.relu(self.key.of_gathered(mixed[0], inside[0])).square()
        value = reduce_from(self.value.partial(inner), self.axis)  # [b, s, h]
        receptance = gather_from(self.receptance.of_gathered(mixed[1], inside[1]), self.axis)
        out: Tensor = torch.sigmoid(receptance) * value
        return scatter_to_sequence_parallel(out.transpose(0, 1), self.axis)


class _Shift:
    """Token shift: x[t - 1] - x[t], with 0 before the first token of a document."""

    def __init__(self, number: int, name: str, spec: BlockSpec) -> None:
        self._number, self._name, self._reset = number, name, spec.reset_attention
        self._shards, self._states = spec.shards, spec.states

    def __call__(
        self, x: Tensor, cache: KVCache | None, document_starts: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[b, s, h] -> differences [b, s, h], document starts [b, s] or None, valid positions [b, s] or None."""
        starts = self._shards.shard_starts(document_starts) if self._reset and document_starts is not None else None
        valid = None if cache is None else cache.valid_mask(x.shape[1])
        before = torch.zeros_like(x[:, :1])
        if cache is not None:
            memory = cache.state(self._number, self._name)
            before = memory.to(x.dtype).unsqueeze(1).clone()
            last = x[:, -1]
            if valid is not None:
                at = valid.sum(1)
                last = torch.cat((before, x), dim=1)[torch.arange(len(x), device=x.device), at]
            memory.copy_(last)
        elif self._states.active:
            before = self._states.positions_before(x, 1)
        shifted = torch.cat((before, x[:, :-1]), dim=1)
        if starts is not None:
            first = starts == torch.arange(x.shape[1], device=x.device)
            shifted = shifted.masked_fill(first.unsqueeze(-1), 0)
        return shifted - x, starts, valid


class _HeadNorm(nn.Module):
    """A layernorm of every head: [b, s, n, d] -> [b, s, a]. Its ``weight`` and ``bias`` [a] are sharded with the
    heads.
    """

    def __init__(self, width: int, head: int, source: ParamFactory) -> None:
        super().__init__()
        self.head = head
        self.weight = source.sharded("weight", (width,), _ones, dim=0)
        self.bias = source.sharded("bias", (width,), _zeros, dim=0)

    def forward(self, y: Tensor) -> Tensor:
        normed = F.layer_norm(y, (self.head,), eps=GROUP_EPSILON).flatten(-2)
        return normed * self.weight + self.bias


class _DepthInit:
    """Initial values that depend on the depth of the block and the index of the feature, as in the public code."""

    def __init__(self, number: int, blocks: int) -> None:
        self.rises = number / max(1, blocks - 1)
        self.falls = 1 - number / blocks

    def mixing(self, power: float, less: float = 0.0) -> InitFn:
        """Returns 1 - (i / h)^(power * falls) - less * rises."""

        def init_fn(tensor: Tensor, generator: torch.Generator) -> None:
            positions = torch.arange(tensor.numel()) / tensor.numel()
            tensor.copy_((1 - positions ** (power * self.falls) - less * self.rises).view_as(tensor))

        return init_fn

    def decay(self, tensor: Tensor, generator: torch.Generator) -> None:
        """Rises from -6 to -1, later for deeper blocks."""
        positions = torch.arange(tensor.numel()) / max(1, tensor.numel() - 1)
        tensor.copy_((-6 + 5 * positions ** (0.7 + 1.3 * self.rises)).view_as(tensor))

    def bonus(self, tensor: Tensor, generator: torch.Generator) -> None:
        """Computes rises * (1 - position), with a zigzag of 0.1."""
        positions = torch.arange(tensor.numel())
        zigzag = ((positions + 1) % 3 - 1) * 0.1
        tensor.copy_((self.rises * (1 - positions / max(1, tensor.numel() - 1)) + zigzag).view_as(tensor))


def _column(inp: int, out: int, source: ParamFactory, spec: BlockSpec, target: str) -> ColumnParallelLinear:
    """Builds a matrix with sharded outputs. target: what `lora` calls it."""
    return ColumnParallelLinear(
        inp,
        out,
        source,
        init_fn=spec.init_fn,
        bias=False,
        kernel=spec.kernels.linear,
        lora=spec.lora_specs.get(target),
        full_sequence=True,
    )


def _row(inp: int, out: int, source: ParamFactory, spec: BlockSpec, target: str) -> RowParallelLinear:
    """Builds a matrix with sharded inputs. target: what `lora` calls it."""
    return RowParallelLinear(
        inp,
        out,
        source,
        init_fn=spec.output_init_fn,
        bias=False,
        kernel=spec.kernels.linear,
        lora=spec.lora_specs.get(target),
    )


def _vector(source: ParamFactory, name: str, size: int, init_fn: InitFn) -> nn.Parameter:
    """Creates a parameter [1, 1, size] for full sequences without weight decay."""
    parameter = source.replicated(name, (1, 1, size), init_fn, full_sequence=True)
    mark_no_weight_decay(parameter)
    return parameter


def _replicated(source: ParamFactory, name: str, shape: tuple[int, ...]) -> nn.Parameter:
    return source.replicated(name, shape, _small, full_sequence=True)


def _norm(spec: BlockSpec, source: ParamFactory) -> nn.Module:
    """Builds a layernorm of the residual stream, independent of `norm`."""
    norm = LayerNorm(spec.dims.hidden_size, EPSILON, bias=True)
    if source.axis.sequence_parallel:
        for parameter in norm.parameters():
            mark_partial_grad(parameter, source.axis)
    return norm


def _small(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(-1e-4, 1e-4, generator=generator)


def _ones(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.fill_(1)


def _zeros(tensor: Tensor, generator: Any) -> None:
    tensor.zero_()
