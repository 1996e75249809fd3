"""The tensors of the parts that blocks are made of."""

from __future__ import annotations

from megatron.shapes.dims import ModelDims
from megatron.shapes.tensor import TensorShape

FIRST_BLOCK = 2
"""Layer index of block 0."""

SHARED_NAME = "attention.rpe.weight"
"""The table of relative positions: one for all blocks, which is that of block 0."""

NORM_TENSORS = {
    "layernorm": ("weight", "bias"),
    "rmsnorm": ("scale",),
    "scalenorm": ("g",),
    "non_parametric_layernorm": (),
    "te_layernorm": ("weight", "bias"),
    "te_rmsnorm": ("weight",),
}
"""What each norm holds."""


def key_in_table(layer: int, name: str) -> str:
    """The key "<layer>.<name>" under which the table holds a parameter that a layer has under that name."""
    return f"{FIRST_BLOCK if name == SHARED_NAME else layer}.{name}"


def norm(dims: ModelDims, layer: int, name: str, size: int | None = None) -> list[TensorShape]:
    """A norm of the residual stream, or of another number of features."""
    size = size or dims.hidden_size
    parts = NORM_TENSORS[dims.norm]
    if dims.norm == "layernorm" and not dims.norm_bias:
        parts = ("weight",)
    return [TensorShape(layer, f"{name}.{part}", (1,) if part == "g" else (size,), None, "norm") for part in parts]


def column(layer: int, name: str, out: int, inp: int, bias: bool, sections: tuple[int, ...] = ()) -> list[TensorShape]:
    """A linear layer whose outputs are cut."""
    table = [TensorShape(layer, f"{name}.weight", (out, inp), 0, "weight", sections)]
    if bias:
        table.append(TensorShape(layer, f"{name}.bias", (out,), 0, "bias", sections))
    return table


def row(layer: int, name: str, out: int, inp: int, bias: bool) -> list[TensorShape]:
    """A linear layer whose inputs are cut; its bias is added after the sum."""
    table = [TensorShape(layer, f"{name}.weight", (out, inp), 1, "weight")]
    if bias:
        table.append(TensorShape(layer, f"{name}.bias", (out,), None, "bias"))
    return table
