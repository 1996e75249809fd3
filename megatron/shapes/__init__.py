"""The one table of a model's tensors: layer index, name, global shape and how tensor parallelism cuts it."""

from megatron.shapes.dims import MixtureDims, ModelDims
from megatron.shapes.table import tensors
from megatron.shapes.tensor import TensorShape

__all__ = ["MixtureDims", "ModelDims", "TensorShape", "tensors"]
