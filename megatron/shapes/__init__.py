"""The one table of a model's tensors: layer index, name, global shape and how tensor parallelism cuts it."""

from megatron.shapes.dims import ModelDims
from megatron.shapes.table import TensorShape, tensors

__all__ = ["ModelDims", "TensorShape", "tensors"]
