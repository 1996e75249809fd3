"""The Mamba block (arXiv:2312.00752, section 3.4): x + mixer(norm(x)), without an MLP.

The mixer projects the input to two halves. One goes through a short causal convolution and a selective state space, the
other gates the result. Channels are independent in between, so they are sharded over tensor-parallel ranks; only the
small product for the step and the two projections of the state (x_proj) needs a sum over ranks.

Sizes and names are those of the public layout: twice the hidden size, 16 states a channel, a convolution of width 4, a
step of rank hidden / 16.

Shapes: s sequence, b micro batch, h hidden, d channels of this rank, n state of a channel, q rank of the step, w width
of the convolution, t tensor-parallel degree.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.collectives import copy_to, reduce_from
from megatron.distributed.param_attrs import mark_no_weight_decay
from megatron.distributed.param_init import ParamFactory, zeros
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.kernels.mamba import MambaKernels
from megatron.kernels.scan import causal_convolution, selective_scan
from megatron.model.block import Block
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.mixers.short_convolution import ShortConvolution, uniform
from megatron.param_table import MixerDims

STEP_RANGE = (0.001, 0.1)
STEP_FLOOR = 1e-4
"""Steps start log-uniform in this range, and not below this (section 3.6 and the reference code)."""


class MambaTransformerBlock(Block):
    """Mamba block ``number`` (from 0)."""

    zero3_gather_together = True

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(spec, source.axis)
        self.norm = spec.norm()
        self.mixer = MambaMixer(number, spec, source.of("mixer"))
        self.to(spec.dtype)

    def forward(self, hidden: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        return self.add(hidden, self.mixer(self.norm(hidden), cache, document_starts))


class MambaMixer(nn.Module):
    """Convolution, selective scan and gate. ValueError if channels do not divide by the tensor-parallel degree."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        dims, hidden = spec.dims.mixers, spec.dims.hidden_size
        self.number, self.dims, self.axis = number, dims, source.axis
        self.kernels: MambaKernels = spec.kernels.mamba
        self.reset = spec.reset_attention
        self.shards, self.states = spec.shards, spec.states
        inner, bias, kernel = dims.mamba_inner, dims.mamba_linear_bias, spec.kernels.linear
        self.A_log = source.sharded("A_log", (inner, dims.mamba_state), _init_a_log, dim=0)
        self.D = source.sharded("D", (inner,), ones, dim=0)
        mark_no_weight_decay(self.A_log)
        self.in_proj = ColumnParallelLinear(
            hidden,
            2 * inner,
            source.of("in_proj"),
            init_fn=spec.init_fn,
            bias=bias,
            sections=(inner, inner),
            kernel=kernel,
            lora=spec.lora_specs.get("in_proj"),
        )
        self.conv1d = ShortConvolution(inner, dims.mamba_convolution, source.of("conv1d"), bias=dims.mamba_conv_bias)
        self.x_proj = _AllReducedLinear(inner, dims.mamba_rank + 2 * dims.mamba_state, source.of("x_proj"), spec, bias)
        self.dt_proj = _StepLinear(dims, source.of("dt_proj"))
        self.out_proj = RowParallelLinear(
            inner,
            hidden,
            source.of("out_proj"),
            init_fn=spec.output_init_fn,
            bias=bias,
            kernel=kernel,
            lora=spec.lora_specs.get("out_proj"),
        )

    def forward(self, x: Tensor, cache: KVCache | None, document_starts: Tensor | None) -> Tensor:
        """[s, b, h] -> [s, b, h], equal on all ranks."""
        starts = document_starts if self.reset else None
        x, gate = self.in_proj(x).transpose(0, 1).chunk(2, dim=-1)  # [b, s, d] each
        if starts is not None:
            starts = self.shards.shard_starts(starts)
        if cache is None and starts is None and not self.states.active:
            y = self._scan_full_sequence(x, gate)
        else:
            y = self._with_state(x, cache, starts) * F.silu(gate)
        return self.out_proj(y.transpose(0, 1))  # [s, b, h]

    def _scan_full_sequence(self, x: Tensor, gate: Tensor) -> Tensor:
        """Processes full sequences without state, by the fastest kernels: [b, s, d] -> [b, s, d]."""
        x = self.kernels.convolution(x, self.conv1d.taps, self.conv1d.bias)
        step, into, out = self.x_proj(x).split(self._widths, dim=-1)
        return self.kernels.scan(x, self.dt_proj(step), self._a, into, out, self.D, self.dt_proj.bias, gate)

    def _with_state(self, x: Tensor, cache: KVCache | None, starts: Tensor | None) -> Tensor:
        """Processes sequences that continue a state or hold several documents: [b, s, d] -> [b, s, d], not yet
        gated.
        """
        length = x.shape[1]
        state, valid = (None, None) if cache is None else (cache.state(self.number, "state"), cache.valid_mask(length))
        before = self.conv1d.inputs_before(x, self.number, cache, self.states)
        resets = None if starts is None else starts == torch.arange(length, device=x.device)
        x = F.silu(causal_convolution(x, self.conv1d.taps, self.conv1d.bias, before, starts))
        step, into, out = self.x_proj(x).split(self._widths, dim=-1)
        if cache is None and self.states.active:
            wide = torch.promote_types(x.dtype, torch.float32)
            state = self.states.receive(x, len(x), x.shape[2], self.dims.mamba_state, dtype=wide)
        step = F.softplus(self.dt_proj(step).float() + self.dt_proj.bias.float())
        y, last = selective_scan(x, step, self._a, into, out, self.D.float(), state, resets, valid)
        if cache is None:
            return self.states.send(y.to(x.dtype), last)
        assert state is not None
        state.copy_(last)
        return y.to(x.dtype)

    @property
    def _widths(self) -> tuple[int, int, int]:
        return self.dims.mamba_rank, self.dims.mamba_state, self.dims.mamba_state

    @property
    def _a(self) -> Tensor:
        """A [d, n] in fp32, negative."""
        return -torch.exp(self.A_log.float())


class _AllReducedLinear(nn.Module):
    """A row-parallel product inside a tensor-parallel region: all-reduce both forward and backward."""

    def __init__(self, inp: int, out: int, source: ParamFactory, spec: BlockSpec, bias: bool) -> None:
        super().__init__()
        self.axis, self.kernel = source.axis, spec.kernels.linear
        self.weight = source.sharded("weight", (out, inp), spec.init_fn, dim=1)
        self.bias = source.replicated("bias", (out,), zeros, full_sequence=True) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inp/t] -> [..., out]."""
        total = reduce_from(self.kernel(x, self.weight, None), self.axis)
        return copy_to(total if self.bias is None else total + self.bias, self.axis)


class _StepLinear(nn.Module):
    """Projects the step from its rank to the channels: ``weight`` [d, q]; the softplus adds ``bias`` [d]."""

    def __init__(self, dims: MixerDims, source: ParamFactory) -> None:
        super().__init__()
        inner, rank = dims.mamba_inner, dims.mamba_rank
        self.weight = source.sharded("weight", (inner, rank), uniform(rank**-0.5), dim=0)
        self.bias = source.sharded("bias", (inner,), init_step_bias, dim=0)

    def forward(self, step: Tensor) -> Tensor:
        """[b, s, q] -> [b, s, d], without the bias."""
        return F.linear(step, self.weight)


def _init_a_log(tensor: Tensor, generator: torch.Generator) -> None:
    """log(1), log(2), ... for the states of every channel (S4D-Real, arXiv:2206.11893)."""
    tensor.copy_(torch.arange(1, tensor.shape[1] + 1).log().expand_as(tensor))


def ones(tensor: Tensor, generator: torch.Generator) -> None:
    """The InitFn of ones."""
    tensor.fill_(1)


def init_step_bias(tensor: Tensor, generator: torch.Generator) -> None:
    """The InitFn of the inverse of softplus of log-uniform steps."""
    low, high = (math.log(step) for step in STEP_RANGE)
    steps = tensor.uniform_(low, high, generator=generator).exp_().clamp_(min=STEP_FLOOR)
    tensor.copy_(steps + torch.log(-torch.expm1(-steps)))
