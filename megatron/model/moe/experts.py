"""The experts of a rank: a stack of MLPs, and the exchange of tokens with the ranks that hold the others.

Names of parameters are those of the public layout: `experts.mlp.w1`, `w3`, `w2`; b1, b3 and b2 are their biases.

Shapes: n tokens, h hidden, k experts of a token, e experts of this rank, m assigned rows, w width of an expert, t
tensor-parallel and p expert-parallel degree.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megatron.adapter_config import EXPERTS_IN, EXPERTS_OUT
from megatron.distributed.expert_all_to_all import all_to_all_counts, all_to_all_rows
from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import ParamFactory, zeros
from megatron.distributed.tensor_parallel.lora import init_lora_a
from megatron.kernels.frozen_linear import FrozenMatrix
from megatron.kernels.grouped_matmul import frozen_grouped, low_rank_grouped
from megatron.model.block_spec import BlockSpec
from megatron.model.moe.dispatch import Dispatch


class ExpertParallelMLP(nn.Module):
    """The experts of this rank."""

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        assert spec.moe_config is not None
        self.axis, self.permutation = spec.moe_config.axis, spec.kernels.permutation
        self.mlp = ExpertStack(spec, source.of("mlp"), self.axis)
        trained = not spec.dims.frozen or self.mlp.updates is not None  # frozen ones have no gradients
        if self.axis.size > 1 and trained:
            from megatron.model.moe.deepspeed_marker import DeepSpeedExperts

            self.mark = DeepSpeedExperts(spec.dims.mixture.experts)

    def forward(self, tokens: Tensor, routes: Dispatch, weights: Tensor) -> Tensor:
        """Tokens [n, h] and the weights of their experts [n, k] -> weighted sums of the experts' outputs [n, h]."""
        prepared = self.permutation.prepare(routes.order, weights.numel())
        rows = self.permutation.gather(tokens, routes.order, prepared, weights.shape[1])  # [m, h]
        made = self._visit(rows, routes.counts)  # [m, h]
        return self.permutation.combine(made, weights, routes.order, prepared)  # [n, h]

    def _visit(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Applies each row's expert, on whichever rank it is: rows [m, h] in order of experts -> [m, h]."""
        if self.axis.size == 1:
            return self.mlp(rows, counts)
        sent = counts.view(self.axis.size, -1)  # [p, e]
        received = all_to_all_counts(sent, self.axis)  # [p, e]
        numbers = torch.stack((sent.sum(1), received.sum(1))).tolist()  # [2, p]
        came = all_to_all_rows(rows, numbers[0], numbers[1], self.axis)
        local = torch.arange(received.shape[1], device=rows.device).repeat(self.axis.size)
        order = local.repeat_interleave(received.flatten(), output_size=sum(numbers[1])).argsort(stable=True)
        made = self.mlp(came.index_select(0, order), received.sum(0))
        back = torch.zeros_like(came).index_copy(0, order, made)
        return all_to_all_rows(back, numbers[1], numbers[0], self.axis)


class ExpertStack(nn.Module):
    """The matrices of this rank's experts: w1 (and w3, the plain half of a gated activation) and w2, [e w/t, h], which
    are no parameters where they are frozen in few bits.

    With biases each has a vector, [e w/t] or for w2 [e h]; of the latter every tensor-parallel rank adds the same part
    to its term of the sum.
    """

    def __init__(self, spec: BlockSpec, source: ParamFactory, axis: Axis) -> None:
        super().__init__()
        dims = spec.dims
        count, shape = dims.mixture.experts, (dims.expert_width, dims.hidden_size)
        self.local = count // axis.size
        self.product, self.activation = spec.kernels.grouped, spec.activation
        self.w1 = source.expert_stack("w1", shape, spec.init_fn, count=count, over=axis)
        self.w3 = source.expert_stack("w3", shape, spec.init_fn, count=count, over=axis) if dims.gated else None
        self.w2 = source.expert_stack("w2", shape, spec.output_init_fn, count=count, over=axis, transposed=True)
        self.parts = source.axis.size
        self.b1 = self.b3 = self.b2 = None
        if dims.mixture.bias:
            self.b1 = source.expert_biases("b1", shape[0], count=count, over=axis, sharded=True)
            self.b3 = source.expert_biases("b3", shape[0], count=count, over=axis, sharded=True) if dims.gated else None
            self.b2 = source.expert_biases("b2", shape[1], count=count, over=axis, sharded=False)
        self._add_updates(spec, source, axis)

    def _add_updates(self, spec: BlockSpec, source: ParamFactory, axis: Axis) -> None:
        """Creates A and B of each expert: of w1 and w3, which share A [e r, h] and have B [e w/t, r]; of w2, [in, out]
        as it is, A [e w/t, r] and B [e r, h].
        """
        inner, outer = (spec.lora_specs.get(name) for name in (EXPERTS_IN, EXPERTS_OUT))
        self.updates = inner or outer
        width, hidden = spec.dims.expert_width, spec.dims.hidden_size
        self.lora_A1 = self.lora_B1 = self.lora_B3 = self.lora_A2 = self.lora_B2 = None
        if self.updates is None:
            return
        down, up, rank = init_lora_a, zeros, self.updates.rank
        stack = partial(source.expert_stack, count=spec.dims.mixture.experts, over=axis)
        if inner is not None:
            self.lora_A1 = stack("lora_A1", (rank, hidden), down, sharded=False)
            self.lora_B1 = stack("lora_B1", (width, rank), up)
            self.lora_B3 = stack("lora_B3", (width, rank), up) if self.w3 is not None else None
        if outer is not None:
            self.lora_A2 = stack("lora_A2", (width, rank), down, transposed=True)
            self.lora_B2 = stack("lora_B2", (rank, hidden), up, transposed=True, sharded=False)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [m, h] in order of experts, and the rows of each [e] -> this rank's term of the sum [m, h]."""
        expert = self._expert_of(counts, len(rows)) if self.b2 is not None else None  # [m]
        changes = self._changes(rows, (self.lora_A1, self.lora_B1, self.lora_B3), counts, turned=True)
        inner = _sum(self._times(rows, self.w1, counts, turned=True), changes[:1])  # [m, w/t]
        inner = self._biased(inner, self.b1, expert)
        if self.w3 is not None:
            plain = _sum(self._times(rows, self.w3, counts, turned=True), changes[1:])
            inner = torch.cat((self._biased(plain, self.b3, expert), inner), dim=-1)  # [m, 2w/t]
        active = self.activation(inner)
        changes = self._changes(active, (self.lora_A2, self.lora_B2), counts, turned=False)
        return self._biased(_sum(self._times(active, self.w2, counts, turned=False), changes), self.b2, expert)

    def _times(self, rows: Tensor, weight: Tensor | FrozenMatrix, counts: Tensor, *, turned: bool) -> Tensor:
        """Returns the products of rows in order of experts with their matrices; turned: these are [out, in]."""
        if not isinstance(weight, Tensor):
            return frozen_grouped(self.product, rows, weight, counts, turned=turned)
        stack = self._stack(weight)
        return self.product(rows, stack.transpose(1, 2) if turned else stack, counts)

    def _changes(
        self, rows: Tensor, factors: tuple[Tensor | None, ...], counts: Tensor, *, turned: bool
    ) -> tuple[Tensor, ...]:
        """Returns what updates add to the products of rows with experts' matrices; nothing where there are none.

        Args:
            rows: in order of experts [m, in].
            factors: A and each B, None for those that there are not.
            counts: rows of each expert [e].
            turned: whether factors are [out, in] for each expert.
        """
        stacks = tuple(self._stack(factor) for factor in factors if factor is not None)
        if self.updates is None or not stacks:
            return ()
        stacks = tuple(stack.transpose(1, 2) for stack in stacks) if turned else stacks
        return low_rank_grouped(self.product, rows, stacks, counts, self.updates.scale)

    def _expert_of(self, counts: Tensor, rows: int) -> Tensor:
        """Returns the number of each row's expert on this rank, [m]."""
        return torch.arange(self.local, device=counts.device).repeat_interleave(counts, output_size=rows)

    def _biased(self, rows: Tensor, bias: Tensor | None, expert: Tensor | None) -> Tensor:
        """Adds the bias of each row's expert; of b2, which ranks add to terms of a sum, one part a rank."""
        if bias is None or expert is None:
            return rows
        added = bias.view(self.local, -1).index_select(0, expert)
        return rows + (added / self.parts if bias is self.b2 else added)

    def _stack(self, weight: Tensor) -> Tensor:
        """[e w/t, h] -> [e, w/t, h]."""
        return weight.view(self.local, -1, weight.shape[1])


def _sum(product: Tensor, changes: tuple[Tensor, ...]) -> Tensor:
    """Adds what an update changes, if anything."""
    return product + changes[0] if changes else product
