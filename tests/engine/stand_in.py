"""A stand-in for NVIDIA's Transformer Engine, whose kernels need a GPU: its interface over torch's own operations.

It has the parameters that the package's layers have, under their names, and what they do with ranks; FP8 only notes
that it was on. What a test gets from it is whether ours gives each layer the right tensors, sizes and ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.mesh import Axis
from megatron.distributed.tensor_parallel.sequence_parallel import gather_or_copy_to_tp, reduce_from_tp


@dataclass
class Seen:
    """How often each layer ran forward, how often within FP8, and what recipe that had."""

    calls: dict[str, int] = field(default_factory=dict)
    in_fp8: dict[str, int] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    within: bool = False

    def note(self, name: str) -> None:
        counts = self.in_fp8 if self.within else self.calls
        counts[name] = counts.get(name, 0) + 1


def empty(*shape: int, device: str, dtype: torch.dtype) -> nn.Parameter:
    assert device == "meta", "the layers' own parameters would take memory twice"
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))


class Layer(nn.Module):
    """One that notes its calls."""

    seen: Seen


class Linear(Layer):
    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        self.weight = empty(out_features, in_features, device=device, dtype=params_dtype)
        self.bias = empty(out_features, device=device, dtype=params_dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        self.seen.note("Linear")
        return F.linear(x, self.weight, self.bias)


class LayerNormMLP(Layer):
    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        eps: float,
        bias: bool,
        normalization: str,
        activation: str,
        set_parallel_mode: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        tp_size: int,
        params_dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__()
        assert set_parallel_mode == (tp_group is not None) == (tp_size > 1)
        rank = dist.get_rank(tp_group) if tp_group is not None else 0
        self.axis = Axis("model", tp_size, rank, group=tp_group, sequence_parallel=sequence_parallel)
        self.eps, self.normalization = eps, normalization
        made = partial(empty, device=device, dtype=params_dtype)
        width = ffn_hidden_size // tp_size
        self.act = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}[activation]
        self.layer_norm_weight = made(hidden_size)
        self.layer_norm_bias = made(hidden_size) if normalization == "LayerNorm" else None
        self.fc1_weight, self.fc2_weight = made(width, hidden_size), made(hidden_size, width)
        self.fc1_bias = made(width) if bias else None
        self.fc2_bias = made(hidden_size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        self.seen.note("LayerNormMLP")
        shape = self.layer_norm_weight.shape
        if self.normalization == "LayerNorm":
            normed = F.layer_norm(x, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        else:
            normed = F.rms_norm(x, shape, self.layer_norm_weight, self.eps)
        inner = self.act(F.linear(gather_or_copy_to_tp(normed, self.axis), self.fc1_weight, self.fc1_bias))
        out = reduce_from_tp(F.linear(inner, self.fc2_weight), self.axis)
        return out if self.fc2_bias is None else out + self.fc2_bias


class DotProductAttention(Layer):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        qkv_format: str,
    ) -> None:
        super().__init__()
        assert qkv_format == "sbhd"
        self.sizes = (num_attention_heads, num_gqa_groups, kv_channels)
        self.attention_dropout = attention_dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, attn_mask_type: str, window_size: tuple[int, int]) -> Tensor:
        self.seen.note("DotProductAttention")
        assert attn_mask_type == "causal"
        assert (q.shape[2], k.shape[2], q.shape[3]) == self.sizes
        at = torch.arange(len(q))
        behind = at[:, None] - at
        mask = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        dropout = self.attention_dropout if self.training else 0.0
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


@dataclass
class DelayedScaling:
    margin: int
    fp8_format: Enum
    amax_history_len: int
    amax_compute_algo: str
    reduce_amax: bool
    fp8_dpa: bool


@contextmanager
def within_fp8(seen: Seen, *, enabled: bool, recipe: Any, amax_reduction_group: Any) -> Iterator[None]:
    assert enabled
    assert recipe.reduce_amax == (amax_reduction_group is not None)
    seen.recipe = {**asdict(recipe), "fp8_format": recipe.fp8_format.name}
    seen.within = True
    try:
        yield
    finally:
        seen.within = False


def modules(seen: Seen) -> dict[str, ModuleType]:
    """The package's modules, by name, whose calls are noted."""
    top, pytorch, common, recipe = (
        ModuleType(f"transformer_engine{name}") for name in ("", ".pytorch", ".common", ".common.recipe")
    )
    for layer in (Linear, LayerNormMLP, DotProductAttention):
        setattr(pytorch, layer.__name__, type(layer.__name__, (layer,), {"seen": seen}))
    pytorch.__dict__["autocast"] = partial(within_fp8, seen)
    recipe.__dict__.update(DelayedScaling=DelayedScaling, Format=Enum("Format", ["HYBRID", "E4M3"]))
    top.__dict__.update(pytorch=pytorch, common=common)
    common.__dict__.update(recipe=recipe)
    return {module.__name__: module for module in (top, pytorch, common, recipe)}


def install() -> Seen:
    """Puts it in the package's place, in this process, for good."""
    seen = Seen()
    sys.modules.update(modules(seen))
    return seen
