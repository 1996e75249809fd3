"""The tensors of the parts that blocks are made of."""

from __future__ import annotations

from megatron.shapes.dims import ModelDims
from megatron.shapes.tensor import TensorShape


def norm(dims: ModelDims, layer: int, name: str) -> list[TensorShape]:
    """A norm of the residual stream."""
    if dims.norm == "rmsnorm":
        return [TensorShape(layer, f"{name}.scale", (dims.hidden_size,), None, "norm")]
    table = [TensorShape(layer, f"{name}.weight", (dims.hidden_size,), None, "norm")]
    if dims.norm_bias:
        table.append(TensorShape(layer, f"{name}.bias", (dims.hidden_size,), None, "norm"))
    return table


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
