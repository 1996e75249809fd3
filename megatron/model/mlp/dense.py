"""MLP of a block: a column-parallel layer, the activation, a row-parallel layer.

Shapes: s sequence, b micro batch, h hidden, w MLP width, t tensor-parallel degree.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import Regather
from megatron.model.block_spec import BlockSpec


class ParallelMLP(nn.Module):
    """linear2(activation(linear1(x))); a gated activation takes twice the width from linear1."""

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        dims, kernel = spec.dims, spec.kernels.linear
        sections = (dims.mlp_width, dims.mlp_width) if dims.gated else ()
        self.linear1 = ColumnParallelLinear(
            dims.hidden_size,
            sum(sections) or dims.mlp_width,
            source.of("linear1"),
            init_fn=spec.init_fn,
            bias=dims.mlp_bias,
            sections=sections,
            kernel=kernel,
            lora=spec.lora_specs.get("dense_h_to_4h"),
        )
        self.activation = spec.activation if spec.learned is None else spec.learned(source.of("activation"))
        self.linear2 = RowParallelLinear(
            dims.mlp_width,
            dims.hidden_size,
            source.of("linear2"),
            init_fn=spec.output_init_fn,
            bias=dims.mlp_bias,
            kernel=kernel,
            lora=spec.lora_specs.get("dense_4h_to_h"),
        )

    def inner(self, x: Tensor, regather: Regather | None = None) -> Tensor:
        """[s, b, h] -> the input of linear2 [s, b, w/t]."""
        return self.activation(self.linear1(x, regather))

    def partial(self, x: Tensor, regather: Regather | None = None) -> Tensor:
        """[s, b, h] -> this rank's term of the sum over ranks; the caller reduces, then adds the bias."""
        return self.linear2.partial(self.inner(x, regather))

    def add_bias(self, total: Tensor) -> Tensor:
        """Completes ``partial`` after the sum over ranks."""
        return self.linear2.add_bias(total)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h], equal on all ranks."""
        regather = Regather.of(self.linear1.axis)
        return self.linear2(self.inner(x, regather), regather)
