"""The Mamba-2 block (arXiv:2405.21060, section 7): x + mixer(norm(x)), without an MLP.

One projection gives the gate, the input of the heads, B and C of each group of heads, and the step of each head. Input,
B and C go through a short causal convolution together. A norm over the features of each group and the gate follow the
state space. Heads are independent and every rank has whole groups, so no sum over tensor-parallel ranks is needed
before the last projection.

Names, the order of rows and initial values are those of the package mamba-ssm.

Shapes: s sequence, b micro batch, h hidden; of this rank k heads, p features of a head, d = k p, g groups; n state,
w width of the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.kernels.scan import causal_convolution
from megatron.kernels.ssd import add_state, chunk_scan, one_step, reached
from megatron.model.block import Block
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.mixers.mamba import init_step_bias, ones
from megatron.model.mixers.short_convolution import ShortConvolution
from megatron.param_table.mixer_dims import Mamba2Dims

RATES = (1.0, 16.0)
"""The rates -A of the heads start uniform in this range."""


class Mamba2TransformerBlock(Block):
    """Mamba-2 block ``number`` (from 0)."""

    zero3_gather_together = True

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(spec, source.axis)
        self.norm = spec.norm()
        self.mixer = Mamba2Mixer(number, spec, source.of("mixer"))
        self.to(spec.dtype)

    def forward(self, hidden: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        return self.add(hidden, self.mixer(self.norm(hidden), cache, document_starts))


class Mamba2Mixer(nn.Module):
    """Convolution, state space, norm and gate. ValueError if heads or groups do not divide by the ranks."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        mixers, hidden, kernel = spec.dims.mixers, spec.dims.hidden_size, spec.kernels.linear
        self.dims, ranks = mixers.mamba2, source.axis.size
        self.number, self.reset = number, spec.reset_attention
        self.shards, self.states, self.convolve = spec.shards, spec.states, spec.kernels.mamba.convolution
        sizes, bias = self.dims, mixers.mamba_linear_bias
        self.A_log = source.sharded("A_log", (sizes.heads,), _init_a_log, dim=0)
        self.D = source.sharded("D", (sizes.heads,), ones, dim=0)
        self.dt_bias = source.sharded("dt_bias", (sizes.heads,), init_step_bias, dim=0)
        sections = (sizes.inner, *sizes.mixed, sizes.heads)
        self.in_proj = ColumnParallelLinear(
            hidden,
            sum(sections),
            source.of("in_proj"),
            init_fn=spec.init_fn,
            bias=bias,
            sections=sections,
            kernel=kernel,
            lora=spec.lora_specs.get("in_proj"),
        )
        self.conv1d = ShortConvolution(
            sum(sizes.mixed),
            mixers.mamba_convolution,
            source.of("conv1d"),
            bias=mixers.mamba_conv_bias,
            sections=sizes.mixed,
        )
        self.norm = GatedNorm(sizes, source.of("norm"))
        self.out_proj = RowParallelLinear(
            sizes.inner,
            hidden,
            source.of("out_proj"),
            init_fn=spec.output_init_fn,
            bias=bias,
            kernel=kernel,
            lora=spec.lora_specs.get("out_proj"),
        )
        self.widths = sizes.inner // ranks, sum(sizes.mixed) // ranks, sizes.heads // ranks
        self.mixed = tuple(width // ranks for width in sizes.mixed)

    def forward(self, x: Tensor, cache: KVCache | None, document_starts: Tensor | None) -> Tensor:
        """[s, b, h] -> [s, b, h], equal on all ranks."""
        gate, mixed, step = self.in_proj(x).transpose(0, 1).split(self.widths, dim=-1)  # [b, s, ...]
        starts = self.shards.shard_starts(document_starts) if self.reset and document_starts is not None else None
        if cache is None and starts is None and not self.states.active:
            mixed = self.convolve(mixed, self.conv1d.taps, self.conv1d.bias)
        else:
            before = self.conv1d.inputs_before(mixed, self.number, cache, self.states)
            mixed = F.silu(causal_convolution(mixed, self.conv1d.taps, self.conv1d.bias, before, starts))
        y = self._state_space(mixed, step, cache, starts)
        return self.out_proj(self.norm(y, gate).transpose(0, 1))  # [s, b, h]

    def _state_space(self, mixed: Tensor, step: Tensor, cache: KVCache | None, starts: Tensor | None) -> Tensor:
        """Returns the output of the heads in fp32, [b, s, d].

        Args:
            mixed: input of the heads, B and C, after the convolution.
            step: before its bias [b, s, k].
            cache: states of earlier tokens, or None.
            starts: first position that each position sees [b, s], or None.
        """
        wide = torch.promote_types(mixed.dtype, torch.float32)
        x, into, out = mixed.to(wide).split(self.mixed, dim=-1)
        x = x.unflatten(2, (-1, self.dims.head))  # [b, s, k, p]
        into, out = into.unflatten(2, (-1, self.dims.state)), out.unflatten(2, (-1, self.dims.state))  # [b, s, g, n]
        step, rate = self._step(step.to(wide)), -torch.exp(self.A_log.to(wide))
        if cache is not None:
            y = self._cached(x, step, rate, into, out, cache)
        else:
            resets = None if starts is None else starts == torch.arange(x.shape[1], device=x.device)
            y, last = chunk_scan(x, step, rate, into, out, resets)
            if self.states.active:  # after the scan, so that ranks compute theirs at the same time
                state = self.states.receive(x, *last.shape, dtype=last.dtype)
                y, last = add_state(y, last, state, reached(step, rate, resets), out)
                y = self.states.send(y, last)
        return (y + self.D.to(wide).unsqueeze(-1) * x).flatten(2)

    def _step(self, step: Tensor) -> Tensor:
        """Returns positive steps within their limits."""
        step = F.softplus(step + self.dt_bias.to(step.dtype))
        return step if self.dims.limits == (None, None) else step.clamp(*self.dims.limits)

    def _cached(self, x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, cache: KVCache) -> Tensor:
        """Returns y [b, s, k, p] after the state in the cache, and leaves the next one there."""
        state, valid = cache.state(self.number, "state"), cache.valid_mask(x.shape[1])
        if valid is not None:
            step = step.masked_fill(~valid.unsqueeze(-1), 0)
        if x.shape[1] == 1:
            y, last = one_step(x[:, 0], step[:, 0], rate, into[:, 0], out[:, 0], state.to(x.dtype))
            y = y.unsqueeze(1)
        else:
            y, last = chunk_scan(x, step, rate, into, out)
            y, last = add_state(y, last, state.to(x.dtype), reached(step, rate), out)
        state.copy_(last)
        return y


class GatedNorm(nn.Module):
    """RMS norm of each group of heads, of gated values or before the gate, in fp32."""

    def __init__(self, sizes: Mamba2Dims, source: ParamFactory) -> None:
        super().__init__()
        self.weight = source.sharded("weight", (sizes.inner,), ones, dim=0)
        self.group, self.epsilon, self.before = sizes.inner // sizes.groups, sizes.epsilon, sizes.norm_before_gate

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """[b, s, d] and the gate [b, s, d], whose type it returns."""
        opening = F.silu(gate.to(y.dtype))
        if not self.before:
            y = y * opening
        grouped = y.unflatten(-1, (-1, self.group))
        y = F.rms_norm(grouped, (self.group,), eps=self.epsilon).flatten(-2) * self.weight.to(y.dtype)
        return (y * opening if self.before else y).to(gate.dtype)


def _init_a_log(tensor: Tensor, generator: torch.Generator) -> None:
    """Logarithms of uniform rates."""
    tensor.uniform_(*RATES, generator=generator).log_()
