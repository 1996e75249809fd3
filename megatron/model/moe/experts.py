"""The experts of a rank: a stack of MLPs, and the exchange of tokens with the ranks that hold the others.

Names of parameters are those of the public layout: `experts.mlp.w1`, `w3`, `w2`; b1, b3 and b2 are their biases.

Shapes: n tokens, h hidden, k experts of a token, e experts of this rank, m assigned rows, w width of an expert, t
tensor-parallel and p expert-parallel degree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.distributed.expert_all_to_all import all_to_all_counts, all_to_all_rows
from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import ParamFactory
from megatron.model.block_spec import BlockSpec
from megatron.model.moe.dispatch import Dispatch


class ExpertParallelMLP(nn.Module):
    """The experts of this rank."""

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        assert spec.moe_config is not None
        self.axis, self.permutation = spec.moe_config.axis, spec.kernels.permutation
        self.mlp = ExpertStack(spec, source.of("mlp"), self.axis)
        if self.axis.size > 1 and not spec.dims.frozen:  # frozen ones have no gradients
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
    """The matrices of this rank's experts: w1 (and w3, the plain half of a gated activation) and w2, [e w/t, h].

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

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [m, h] in order of experts, and the rows of each [e] -> this rank's term of the sum [m, h]."""
        expert = self._expert_of(counts, len(rows)) if self.b2 is not None else None  # [m]
        inner = self.product(rows, self._stack(self.w1).transpose(1, 2), counts)  # [m, w/t]
        inner = self._biased(inner, self.b1, expert)
        if self.w3 is not None:
            plain = self.product(rows, self._stack(self.w3).transpose(1, 2), counts)
            inner = torch.cat((self._biased(plain, self.b3, expert), inner), dim=-1)  # [m, 2w/t]
        return self._biased(self.product(self.activation(inner), self._stack(self.w2), counts), self.b2, expert)

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
