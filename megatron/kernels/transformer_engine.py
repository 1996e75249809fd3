"""Products, attention and MLP of NVIDIA's Transformer Engine, with parameters of our layers.

A layer of the package has parameters of its own; here it is built on the meta device and gets ours, so that names,
shapes, checkpoints and sharding are those of every other model. Its further state, the largest absolute values for FP8
scaling, is new in each process.

FP8 (arXiv:2209.05433) is active in `fp8_autocast`; elsewhere the layers compute in the type of their parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import transformer_engine.pytorch as te
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from transformer_engine.common.recipe import DelayedScaling, Format

from megatron.kernels.attention import AttentionKernel
from megatron.kernels.attention_patterns import AttentionMask, window_for_package
from megatron.kernels.linear import BoundLinear

WITHOUT_MEMORY = "meta"


def linear_of(weight: Parameter, bias: Parameter | None) -> BoundLinear:
    """Returns the product of the layer with this weight [out, in] and bias [out]."""
    out_features, in_features = weight.shape
    inner = te.Linear(
        in_features, out_features, bias=bias is not None, params_dtype=weight.dtype, device=WITHOUT_MEMORY
    )
    inner.weight = weight
    if bias is not None:
        inner.bias = bias
    return BoundLinear(inner)


class Attention:
    """The attention core of one block."""

    def __init__(self, usual: AttentionKernel) -> None:
        """Creates the core. usual: core for what the package does not support: documents, layouts, biases, cached
        keys.
        """
        self._usual = usual
        self._cores: dict[tuple[int, int, int, float], Any] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout: float = 0.0,
        starts: Tensor | None = None,
        view: AttentionMask | None = None,
    ) -> Tensor:
        """Q [b, n, s, d], k and v [b, m, k, d] -> [b, n, s, d]."""
        behind = window_for_package(starts, view)
        if behind is None or q.shape[2] != k.shape[2]:
            return self._usual(q, k, v, dropout, starts, view)
        batch, heads, length, size = q.shape
        core = self._core(heads, k.shape[1], size, dropout)
        out: Tensor = core(
            *(part.permute(2, 0, 1, 3).contiguous() for part in (q, k, v)),
            attn_mask_type="causal",
            window_size=(behind, 0),
        )  # [s, b, n d]
        return out.view(length, batch, heads, size).permute(1, 2, 0, 3)

    def _core(self, heads: int, kv_heads: int, size: int, dropout: float) -> Any:
        key = (heads, kv_heads, size, dropout)
        if key not in self._cores:
            self._cores[key] = te.DotProductAttention(
                heads, size, num_gqa_groups=kv_heads, attention_dropout=dropout, qkv_format="sbhd"
            ).train(dropout > 0)
        return self._cores[key]


@dataclass(frozen=True)
class NormMLPWeights:
    """Parameters of a norm and an MLP: [h], [w/t, h], [h, w/t] and their biases.

    norm_bias is None for a root mean square norm; the MLP has both biases or none.
    """

    norm: Parameter
    """Scale of the norm [h]."""
    norm_bias: Parameter | None
    """Bias of the norm [h]; None for a root mean square norm."""
    first: Parameter
    """First matrix [w/t, h]."""
    first_bias: Parameter | None
    """Its bias [w/t]."""
    second: Parameter
    """Second matrix [h, w/t]."""
    second_bias: Parameter | None
    """Its bias [h]."""

    def named(self) -> dict[str, Parameter]:
        """Returns the parameters that exist, by the package's names."""
        names = {
            "layer_norm_weight": self.norm,
            "layer_norm_bias": self.norm_bias,
            "fc1_weight": self.first,
            "fc1_bias": self.first_bias,
            "fc2_weight": self.second,
            "fc2_bias": self.second_bias,
        }
        return {name: value for name, value in names.items() if value is not None}


def norm_mlp_of(
    weights: NormMLPWeights,
    *,
    epsilon: float,
    activation: str,
    ranks: int,
    group: ProcessGroup | None,
    sequence_parallel: bool,
) -> Callable[[Tensor], Tensor]:
    """mlp(norm(x)) in one layer, [s, b, h] -> [s, b, h] ([s/t, b, h] with sequence parallelism), summed over the
    ranks.

    Args:
        weights: parameters of the norm and the MLP.
        epsilon: epsilon of the norm.
        activation: activation by the package's name.
        ranks: tensor-parallel degree t.
        group: tensor-parallel ranks.
        sequence_parallel: true if the sequence is sharded outside.
    """
    inner = te.LayerNormMLP(
        weights.norm.shape[0],
        weights.second.shape[1] * ranks,
        eps=epsilon,
        bias=weights.first_bias is not None,
        normalization="RMSNorm" if weights.norm_bias is None else "LayerNorm",
        activation=activation,
        set_parallel_mode=ranks > 1,
        sequence_parallel=sequence_parallel,
        tp_group=group if ranks > 1 else None,
        tp_size=ranks,
        params_dtype=weights.first.dtype,
        device=WITHOUT_MEMORY,
    )
    for name, parameter in weights.named().items():
        setattr(inner, name, parameter)

    def run(x: Tensor) -> Tensor:
        out: Tensor = inner(x)
        return out

    return run


def fp8_autocast(
    *,
    hybrid: bool,
    history: int,
    algorithm: str,
    margin: int,
    group: ProcessGroup | None,
) -> Callable[[], AbstractContextManager[Any]]:
    """Returns a context in which products and attention are in FP8, scaled by the values of earlier steps.

    Args:
        hybrid: e5m2 for gradients, else e4m3 for all.
        history: steps of largest absolute values.
        algorithm: "max" or "most_recent" of these values.
        margin: margin of the scale [bits].
        group: ranks that share their largest values; None does not share them.
    """
    recipe = DelayedScaling(
        margin=margin,
        fp8_format=Format.HYBRID if hybrid else Format.E4M3,
        amax_history_len=history,
        amax_compute_algo=algorithm,
        reduce_amax=group is not None,
        fp8_dpa=True,
    )

    def region() -> AbstractContextManager[Any]:
        entered: AbstractContextManager[Any] = te.autocast(enabled=True, recipe=recipe, amax_reduction_group=group)
        return entered

    return region
