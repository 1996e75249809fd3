"""Linear layers with a sharded weight (Megatron-LM, arXiv:1909.08053, section 3).

A column-parallel layer shards the outputs, a row-parallel layer the inputs, so that a column-parallel layer followed by
a row-parallel one needs a single all-reduce forward and one backward. With sequence parallelism the input of the first
and the output of the second are sharded along the sequence; an all-gather and a reduce-scatter replace the all-reduce.

Either may have a LoRA adapter beside its weight (lora.py), whose output is added to the layer's.

Shapes: in and out are global widths, t the tensor-parallel degree; leading dimensions are free ([s, b] in the model,
[s/t, b] with sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from megatron.distributed.collectives import copy_to
from megatron.distributed.param_init import InitFn, ParamFactory, zeros
from megatron.distributed.partial_grads import mark_partial_grad
from megatron.distributed.tensor_parallel.lora import LoraMatrix, LoraSpec, RowMagnitudes, init_lora_a
from megatron.distributed.tensor_parallel.sequence_parallel import (
    Regather,
    gather_or_copy_to_tp,
    gathered_linear,
    reduce_from_tp,
)
from megatron.kernels.frozen_linear import FrozenLinear
from megatron.kernels.linear import BoundLinear, LinearKernel, plain_linear


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + bias with the rows of W, and so the outputs, sharded over the ranks.

    keeps_weight: true if more than this product reads the weight, so that inference keeps it as it is.
    """

    keeps_weight = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        source: ParamFactory,
        *,
        init_fn: InitFn,
        bias: bool,
        sections: tuple[int, ...] = (),
        kernel: LinearKernel = plain_linear,
        lora: LoraSpec | None = None,
        full_sequence: bool = False,
    ) -> None:
        """Creates the parameters ``weight`` [out/t, in] and ``bias`` [out/t].

        Args:
            in_features: global width of the input.
            out_features: global width of the output.
            source: creates the parameters.
            init_fn: initial values of the weight.
            bias: true for a bias.
            sections: global output widths that are sharded separately (grouped queries, gated MLPs).
            kernel: matrix product.
            lora: LoRA adapter of the layer.
            full_sequence: true if a caller gathers the sequence, for `of_gathered`.
        """
        super().__init__()
        self.axis = source.axis
        self.kernel = kernel
        self.weight = source.sharded("weight", (out_features, in_features), init_fn, dim=0, sections=sections)
        self.bias = source.sharded("bias", (out_features,), zeros, dim=0, sections=sections) if bias else None
        self.lora = lora
        if lora is None:
            return
        every = {"full_sequence": full_sequence}
        down = source.of("lora_A").replicated("weight", (lora.rank, in_features), init_lora_a, **every)
        self.lora_A = LoraMatrix(down, kernel)
        self.lora_B = ColumnParallelLinear(
            lora.rank,
            out_features,
            source.of("lora_B"),
            init_fn=zeros,
            bias=False,
            sections=sections,
            kernel=kernel,
        )
        if lora.magnitudes:
            norms = source.of("lora_magnitude_vector").sharded(
                "weight", (out_features,), zeros, dim=0, sections=sections
            )
            self.lora_magnitude_vector = RowMagnitudes(norms, lora.scale, None)

    def forward(self, x: Tensor, regather: Regather | None = None) -> Tensor:
        """[..., in], equal on all ranks (with sequence parallelism [s/t, .., in]) -> [..., out/t].

        regather: of the region that this layer begins.
        """
        if self.lora is None:
            return self._product(x, self.bias, regather)
        y = self._product(x, None if self.lora.magnitudes else self.bias, regather)
        dropped = self.lora.drop(x, training=self.training, sharded=self.axis.sequence_parallel)
        change = self.lora_B(self.lora.scale * self.lora_A(dropped))
        return self._updated(y, change, None if dropped is x else partial(self._product, dropped, None))

    def of_gathered(self, outside: Tensor, inside: Tensor) -> Tensor:
        """As `forward`, of full sequences [.., in] that a caller has gathered or copied to the ranks -> [.., out/t].

        Args:
            outside: the input for what every rank computes alike.
            inside: the same values for what each rank computes a term of.
        """
        if self.lora is None:
            return self.kernel(inside, self.weight, self.bias)
        y = self.kernel(inside, self.weight, None if self.lora.magnitudes else self.bias)
        dropped = self.lora.drop(outside, training=self.training, sharded=False)
        inner = copy_to(self.lora.scale * self.lora_A(dropped), self.axis)
        change = self.lora_B.kernel(inner, self.lora_B.weight, None)
        if dropped is outside:
            return self._updated(y, change, None)
        return self._updated(y, change, lambda: self.kernel(copy_to(dropped, self.axis), self.weight, None))

    def _updated(self, y: Tensor, change: Tensor, again: Callable[[], Tensor] | None) -> Tensor:
        """Returns the outputs with the update of the adapter [..., out/t].

        Args:
            y: x Wᵀ, with the bias where no norms of rows are trained.
            change: output of the adapter.
            again: returns the product of the input after dropout; None without dropout.
        """
        assert self.lora is not None
        if not self.lora.magnitudes:
            return y + change
        factor = self.lora_magnitude_vector.factor(self.weight, self.lora_A.weight, self.lora_B.weight)
        product = y if again is None else again()
        scaled: Tensor = self.lora_magnitude_vector(y, product, change, factor)
        return scaled if self.bias is None else scaled + self.bias

    def _product(self, x: Tensor, bias: Tensor | None, regather: Regather | None = None) -> Tensor:
        """Returns x Wᵀ + bias, [..., out/t], of the full sequence [s, ..]."""
        if self.axis.sequence_parallel and not isinstance(self.kernel, (BoundLinear, FrozenLinear)):
            return gathered_linear(x, self.weight, bias, self.axis, self.kernel, regather)
        return self.kernel(gather_or_copy_to_tp(x, self.axis), self.weight, bias)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + bias with the columns of W, and so the inputs, sharded over the ranks.

    The bias is the same on every rank and is added once, after the sum over ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        source: ParamFactory,
        *,
        init_fn: InitFn,
        bias: bool,
        kernel: LinearKernel = plain_linear,
        lora: LoraSpec | None = None,
    ) -> None:
        """Creates the parameters ``weight`` [out, in/t] and ``bias`` [out].

        Args:
            in_features: global width of the input.
            out_features: global width of the output.
            source: creates the parameters.
            init_fn: initial values of the weight.
            bias: true for a bias.
            kernel: matrix product.
            lora: LoRA adapter of the layer.
        """
        super().__init__()
        self.axis = source.axis
        self.kernel = kernel
        self.weight = source.sharded("weight", (out_features, in_features), init_fn, dim=1)
        self.bias = source.replicated("bias", (out_features,), zeros) if bias else None
        self.lora = lora
        if lora is None:
            return
        down = source.of("lora_A").sharded("weight", (lora.rank, in_features), init_lora_a, dim=1)
        up = source.of("lora_B").replicated("weight", (out_features, lora.rank), zeros, full_sequence=True)
        if self.axis.size > 1:  # each rank applies it to its term of the sum
            mark_partial_grad(up, self.axis)
        self.lora_A, self.lora_B = LoraMatrix(down, kernel), LoraMatrix(up, kernel)
        if lora.magnitudes:
            every = {"full_sequence": True}
            norms = source.of("lora_magnitude_vector").replicated("weight", (out_features,), zeros, **every)
            if self.axis.size > 1:
                mark_partial_grad(norms, self.axis)
            self.lora_magnitude_vector = RowMagnitudes(norms, lora.scale, self.axis)

    def forward(self, x: Tensor, regather: Regather | None = None) -> Tensor:
        """[..., in/t] -> [..., out], equal on all ranks (with sequence parallelism [s/t, .., out]).

        regather: of the region that this layer ends.
        """
        return self.add_bias(reduce_from_tp(self.partial(x), self.axis, regather))  # [..., out]

    def partial(self, x: Tensor) -> Tensor:
        """[..., in/t] -> this rank's term of the sum [..., out], without the bias, which the caller adds last.

        On one rank the bias is included, since there is no sum.
        """
        bias = self.bias if self.axis.size == 1 else None
        if self.lora is None:
            return self.kernel(x, self.weight, bias)
        term = self.kernel(x, self.weight, None if self.lora.magnitudes else bias)
        dropped = self.lora.drop(x, training=self.training, sharded=self.axis.size > 1)
        change: Tensor = self.lora_B(self.lora.scale * self.lora_A(dropped))
        if not self.lora.magnitudes:
            return term + change
        factor = self.lora_magnitude_vector.factor(self.weight, self.lora_A.weight, self.lora_B.weight)
        product = term if dropped is x else self.kernel(dropped, self.weight, None)
        scaled: Tensor = self.lora_magnitude_vector(term, product, change, factor)
        return scaled if bias is None else scaled + bias

    def add_bias(self, total: Tensor) -> Tensor:
        """Completes ``partial`` after the sum over ranks."""
        return total if self.bias is None or self.axis.size == 1 else total + self.bias
