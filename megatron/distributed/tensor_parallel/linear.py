"""Linear layers whose weight is cut over tensor-parallel ranks (Megatron-LM, arXiv:1909.08053, section 3).

A column-parallel layer cuts the outputs, a row-parallel layer the inputs, so that a column-parallel layer followed by
a row-parallel one needs a single all-reduce forward and one backward. With sequence parallelism the input of the first
and the output of the second are cut along the sequence, and an all-gather and a reduce-scatter take its place.

Either may have a low-rank update beside its weight (lora.py), whose output is added to the layer's.

Shapes: in and out are global widths, t the tensor-parallel degree; leading dimensions are free ([s, b] in the model,
[s/t, b] where the axis cuts the sequence).
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_partial_grad
from megatron.distributed.param_init import Fill, ParamFactory, zeros
from megatron.distributed.tensor_parallel.lora import Factor, Update, first_factor
from megatron.distributed.tensor_parallel.sequence_parallel import enter, gathered_linear, leave
from megatron.kernels.linear import BoundLinear, LinearKernel, plain_linear


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + bias with the rows of W, and so the outputs, cut over the ranks.

    in_features, out_features: global widths. source: makes the parameters ``weight`` [out/t, in] and ``bias`` [out/t].
    sections: global output widths that are cut one by one (grouped queries, gated MLPs). kernel: the product. update:
    the layer has a low-rank update.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        source: ParamFactory,
        *,
        fill: Fill,
        bias: bool,
        sections: tuple[int, ...] = (),
        kernel: LinearKernel = plain_linear,
        update: Update | None = None,
    ) -> None:
        super().__init__()
        self.axis = source.axis
        self.kernel = kernel
        self.weight = source.shard("weight", (out_features, in_features), fill, dim=0, sections=sections)
        self.bias = source.shard("bias", (out_features,), zeros, dim=0, sections=sections) if bias else None
        self.update = update
        if update is None:
            return
        down = source.of("lora_A").replica("weight", (update.rank, in_features), first_factor)
        self.lora_A = Factor(down, kernel)
        self.lora_B = ColumnParallelLinear(
            update.rank,
            out_features,
            source.of("lora_B"),
            fill=zeros,
            bias=False,
            sections=sections,
            kernel=kernel,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in], equal on all ranks (with sequence parallelism [s/t, .., in]) -> [..., out/t]."""
        if self.axis.sequence and not isinstance(self.kernel, BoundLinear):
            y = gathered_linear(x, self.weight, self.bias, self.axis, self.kernel)  # [s, .., out/t]
        else:
            y = self.kernel(enter(x, self.axis), self.weight, self.bias)  # [s, .., out/t]
        if self.update is None:
            return y
        dropped = self.update.drop(x, training=self.training, cut=self.axis.sequence)
        change: Tensor = self.lora_B(self.update.scale * self.lora_A(dropped))
        return y + change


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + bias with the columns of W, and so the inputs, cut over the ranks.

    The bias is the same on every rank and is added once, after the sum over ranks. Parameters: ``weight`` [out, in/t]
    and ``bias`` [out]. update: the layer has a low-rank update.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        source: ParamFactory,
        *,
        fill: Fill,
        bias: bool,
        kernel: LinearKernel = plain_linear,
        update: Update | None = None,
    ) -> None:
        super().__init__()
        self.axis = source.axis
        self.kernel = kernel
        self.weight = source.shard("weight", (out_features, in_features), fill, dim=1)
        self.bias = source.replica("bias", (out_features,), zeros) if bias else None
        self.update = update
        if update is None:
            return
        down = source.of("lora_A").shard("weight", (update.rank, in_features), first_factor, dim=1)
        up = source.of("lora_B").replica("weight", (out_features, update.rank), zeros, whole_sequence=True)
        if self.axis.size > 1:  # each rank multiplies it with its own term of the sum
            mark_partial_grad(up, self.axis)
        self.lora_A, self.lora_B = Factor(down, kernel), Factor(up, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in/t] -> [..., out], equal on all ranks (with sequence parallelism [s/t, .., out])."""
        return self.add_bias(leave(self.partial(x), self.axis))  # [..., out]

    def partial(self, x: Tensor) -> Tensor:
        """[..., in/t] -> this rank's term of the sum [..., out], without the bias: the caller reduces, then adds it.

        With one rank the bias is already in, as there is nothing to wait for.
        """
        term = self.kernel(x, self.weight, self.bias if self.axis.size == 1 else None)
        if self.update is None:
            return term
        dropped = self.update.drop(x, training=self.training, cut=self.axis.size > 1)
        change: Tensor = self.lora_B(self.update.scale * self.lora_A(dropped))
        return term + change

    def add_bias(self, total: Tensor) -> Tensor:
        """Completes ``partial`` after the sum over ranks."""
        return total if self.bias is None or self.axis.size == 1 else total + self.bias
