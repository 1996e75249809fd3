"""Mixture of experts (MoE) instead of a block's MLP: a router assigns each token to a few experts.

Experts are distributed over the expert-parallel ranks (tokens are exchanged) and each is sharded over the
tensor-parallel ranks (tokens are the same there). Without a capacity no token is dropped. With one, an expert takes the
first tokens in the order of their positions, so no token can displace an earlier one; a token whose expert is full is
passed on by the residual stream alone (arXiv:2101.03961, section 2.2). Padding that the packing of documents added
takes no slot and counts in no loss of the router; without a capacity it passes through experts like any token.

Names of parameters are those of the public layout: `router.layer.weight` and `experts.mlp.w1`, `w3`, `w2`.

Shapes: s sequence, b micro batch, h hidden, n tokens (s b), e experts of this rank, k experts of a token, m assigned
rows, w width of an expert, t tensor-parallel and p expert-parallel degree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.collectives import copy_to
from megatron.distributed.expert_all_to_all import all_to_all_counts, all_to_all_rows
from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.sequence_parallel import gather_twice, reduce_from_tp
from megatron.model.block_spec import BlockSpec
from megatron.model.moe.losses import RouterLossTracker, load_balance, mean_weights, z_loss

Router = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MoEConfig:
    """Settings that all MoE layers of a model share."""

    choose_experts: Router
    """A function of router.py."""
    jitter: float | None
    """The router's input is multiplied by noise in 1 +- this."""
    normalize: bool
    """True if the weights of a token sum to 1."""
    capacity: float | None
    """Slots of an expert over its fair share in training; None for no limit."""
    eval_capacity: float | None
    """The same in evaluation."""
    min_capacity: int
    """Smallest number of slots of an expert."""
    losses: RouterLossTracker
    """Collects the losses of the routers."""
    axis: Axis = field(default_factory=lambda: Axis("expert"))
    """Ranks over which experts are distributed."""
    batch: Axis = field(default_factory=lambda: Axis("dp_cp"))
    """Ranks whose tokens form one batch."""
    context: Axis = field(default_factory=lambda: Axis("context"))
    """Ranks that share a sequence."""


class MoELayer(nn.Module):
    """The router and the experts of one block. takes_padding: its methods take the mask of padding."""

    takes_padding = True

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        assert spec.moe_config is not None
        self.parallel = source.axis
        self.mixture: MoEConfig = spec.moe_config
        self.count, self.top_k = spec.dims.mixture.experts, spec.dims.mixture.top_k
        self.router = RouterLayer(spec, source.of("router"))
        self.experts = ExpertParallelMLP(spec, source.of("experts"))

    def partial(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """[s, b, h] (with sequence parallelism [s/t, b, h]) -> this rank's term [s, b, h] of the sum over ranks.

        padding: bool, True for a token that the packing added, [b, s]; None where there is none.
        """
        x, region = gather_twice(x, self.parallel)  # [s, b, h]
        tokens = x.flatten(0, 1)  # [n, h]
        logits = self.router(self._jittered(tokens))  # [n, all experts], fp32
        mixture = self.mixture
        real = None if padding is None else ~padding.t().flatten()  # [n]
        weights, experts = mixture.choose_experts(
            logits, self.top_k, training=self.training, axis=mixture.context, real=real
        )
        if mixture.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        routes = Dispatch.of(experts, self.count, self._slots(len(tokens)), real)
        if self.training and torch.is_grad_enabled():
            probabilities = logits.softmax(dim=-1)
            shares = None if real is None else mean_weights(real, mixture.batch)
            balance = load_balance(probabilities, routes.requested, mixture.batch, shares)
            weights = mixture.losses.attach(weights, balance, z_loss(logits, shares), routes.dropped)
        weights = copy_to(weights.to(x.dtype), self.parallel)
        return self.experts(region.flatten(0, 1), routes, weights).view_as(x)

    def add_bias(self, total: Tensor) -> Tensor:
        """Returns its input, since experts have no bias."""
        return total

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h], equal on all tensor-parallel ranks. padding as for partial."""
        return reduce_from_tp(self.partial(x, padding), self.parallel)

    def _jittered(self, tokens: Tensor) -> Tensor:
        """Multiplies by noise, the same on all tensor-parallel ranks, whose default generators agree."""
        eps = self.mixture.jitter
        if not eps or not self.training:
            return tokens
        return tokens * torch.empty_like(tokens).uniform_(1 - eps, 1 + eps)

    def _slots(self, tokens: int) -> int | None:
        """Returns the largest number of tokens that an expert takes from this rank."""
        factor = self.mixture.capacity if self.training else self.mixture.eval_capacity
        if factor is None:
            return None
        return max(self.mixture.min_capacity, math.ceil(tokens * self.top_k * factor / self.count))


class RouterLayer(nn.Module):
    """Computes logits of every expert, in fp32 at least (arXiv:2101.03961, section 2.4).

    Its number of outputs does not depend on the width, so to muP it is an output layer.
    """

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        self.layer = _Fp32Linear(spec, source.of("layer"))
        self.multiplier = spec.multipliers.router

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, h] -> [n, all experts]."""
        logits: Tensor = self.layer(tokens)
        return logits if self.multiplier == 1.0 else logits * self.multiplier


class _Fp32Linear(nn.Module):
    """A matrix product in fp32 at least: ``weight`` [all experts, h]."""

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        shape = (spec.dims.mixture.experts, spec.dims.hidden_size)
        self.weight = source.replicated("weight", shape, spec.init_fn, full_sequence=True)

    def forward(self, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return F.linear(tokens.to(wide), self.weight.to(wide))


@dataclass(frozen=True)
class Dispatch:
    """The assignments of n tokens that are not dropped, ordered by expert and then by token."""

    order: Tensor
    """Indices in the flattened [n, k], [m]."""
    counts: Tensor
    """Assignments of each expert [all experts]."""
    requested: Tensor
    """Assignments of each expert before any was dropped, without those of padding."""
    dropped: Tensor
    """Fraction of dropped assignments, without those of padding, scalar."""

    @staticmethod
    def of(experts: Tensor, count: int, slots: int | None, real: Tensor | None = None) -> Dispatch:
        """Creates the dispatch from the experts of each token.

        Args:
            experts: [n, k].
            count: All experts.
            slots: Capacity of an expert, None for no limit.
            real: False for padding, which no expert takes where there is a limit, [n]; None where there is none.
        """
        flat, numbers = experts.flatten(), torch.arange(count, device=experts.device)
        counted = flat if real is None else experts.masked_fill(~real[:, None], count).flatten()
        # torch.bincount would have the host wait for the largest number.
        requested = (counted.unsqueeze(1) == numbers).sum(0)
        if slots is None:
            counts = requested if real is None else (flat.unsqueeze(1) == numbers).sum(0)
            return Dispatch(flat.argsort(stable=True), counts, requested, torch.zeros((), device=flat.device))
        order = counted.argsort(stable=True)  # padding last
        sorted_experts = counted[order]
        first = requested.cumsum(0) - requested  # [all experts]
        rank_in_expert = torch.arange(len(flat), device=flat.device) - first[sorted_experts.clamp(max=count - 1)]
        taken = rank_in_expert < slots
        if real is not None:
            taken &= sorted_experts < count
        counts = requested.clamp(max=slots)
        dropped = (requested - counts).sum() / requested.sum().clamp(min=1)
        return Dispatch(order[taken], counts, requested, dropped)


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
    """The matrices of this rank's experts: w1 (and w3, the plain half of a gated activation) and w2, [e w/t, h]."""

    def __init__(self, spec: BlockSpec, source: ParamFactory, axis: Axis) -> None:
        super().__init__()
        dims = spec.dims
        count, shape = dims.mixture.experts, (dims.mlp_width, dims.hidden_size)
        self.local = count // axis.size
        self.product, self.activation = spec.kernels.grouped, spec.activation
        self.w1 = source.expert_stack("w1", shape, spec.init_fn, count=count, over=axis)
        self.w3 = source.expert_stack("w3", shape, spec.init_fn, count=count, over=axis) if dims.gated else None
        self.w2 = source.expert_stack("w2", shape, spec.output_init_fn, count=count, over=axis, transposed=True)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [m, h] in order of experts, and the rows of each [e] -> this rank's term of the sum [m, h]."""
        inner = self.product(rows, self._stack(self.w1).transpose(1, 2), counts)  # [m, w/t]
        if self.w3 is not None:
            plain = self.product(rows, self._stack(self.w3).transpose(1, 2), counts)
            inner = torch.cat((plain, inner), dim=-1)  # [m, 2w/t]
        return self.product(self.activation(inner), self._stack(self.w2), counts)

    def _stack(self, weight: Tensor) -> Tensor:
        """[e w/t, h] -> [e, w/t, h]."""
        return weight.view(self.local, -1, weight.shape[1])
