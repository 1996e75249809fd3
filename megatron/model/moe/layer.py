"""Mixture of experts (MoE) instead of a block's MLP: a router assigns each token to a few experts.

Experts are distributed over the expert-parallel ranks (tokens are exchanged) and each is sharded over the
tensor-parallel ranks (tokens are the same there). Without a capacity no token is dropped. With one, an expert takes the
first tokens in the order of their positions, so no token can displace an earlier one; a token whose expert is full is
passed on by the residual stream alone (arXiv:2101.03961, section 2.2). Padding that the packing of documents added
takes no slot and counts in no loss of the router; without a capacity it passes through experts like any token.
Shared experts, if there are any, see every token.

Shapes: s sequence, b micro batch, h hidden, n tokens (s b), e experts, k experts of a token, t tensor-parallel degree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.collectives import all_reduced, copy_to
from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import ParamFactory, zeros
from megatron.distributed.tensor_parallel.sequence_parallel import gather_twice, reduce_from_tp
from megatron.model.block_spec import BlockSpec
from megatron.model.moe.dispatch import Dispatch
from megatron.model.moe.experts import ExpertParallelMLP
from megatron.model.moe.losses import (
    ExpertCounts,
    RouterLossTracker,
    RouterTerms,
    load_balance,
    mean_probabilities,
    mean_weights,
    sequence_balance,
    z_loss,
)
from megatron.model.moe.router import RouterOptions, probabilities
from megatron.model.moe.shared_experts import SharedExperts

Router = Callable[..., tuple[Tensor, Tensor]]

CORRECTION_BIAS = "e_score_correction_bias"
"""Name of the buffer of a router that balances its experts."""


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
    options: RouterOptions = field(default_factory=RouterOptions)
    """Scores and groups."""
    scaling: float = 1.0
    """Factor of a token's weights."""
    bias_rate: float = 0.0
    """Change of the correction bias after a step."""
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
        self.shared_experts = (
            SharedExperts(spec, source.of("shared_experts")) if spec.dims.mixture.shared_width else None
        )
        updates_bias = spec.dims.mixture.correction_bias and not spec.dims.frozen
        self.step_counts = ExpertCounts() if updates_bias or self.mixture.losses.of_global_batch else None

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
            logits,
            self.top_k,
            training=self.training,
            axis=mixture.context,
            real=real,
            options=mixture.options,
            bias=self.router.e_score_correction_bias,
        )
        if mixture.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if mixture.scaling != 1.0:
            weights = weights * mixture.scaling
        routes = Dispatch.of(experts, self.count, self._slots(len(tokens)), real)
        if self.training and torch.is_grad_enabled():
            weights = self._with_losses(weights, logits, routes, x.shape[1], real)
        weights = copy_to(weights.to(x.dtype), self.parallel)
        inside = region.flatten(0, 1)
        total = self.experts(inside, routes, weights)
        if self.shared_experts is not None:
            total = total + self.shared_experts.partial(tokens, inside)
        return total.view_as(x)

    def _with_losses(
        self, weights: Tensor, logits: Tensor, routes: Dispatch, batch: int, real: Tensor | None
    ) -> Tensor:
        """Returns the weights with the losses of the router attached.

        Args:
            weights: of the chosen experts [n, k].
            logits: of the router [n, e].
            routes: the assignments.
            batch: sequences of the micro batch.
            real: False for padding [n]; None where there is none.
        """
        mixture, losses, counts = self.mixture, self.mixture.losses, None
        scores = probabilities(logits, mixture.options)
        shares = None if real is None else mean_weights(real, mixture.batch)
        terms = RouterTerms(
            load_balance(scores, routes.requested, mixture.batch, shares),
            z_loss(logits, shares),
            routes.dropped,
            sequence_balance(scores, self.top_k, batch, mixture.context, real) if losses.sequence else None,
            mean_probabilities(scores, shares) if losses.of_global_batch else None,
        )
        if self.step_counts is not None:
            counts = all_reduced(routes.requested, mixture.batch)
        return losses.attach(weights, terms, counts, self.step_counts)

    @torch.no_grad()
    def update_bias(self, skipped: Tensor) -> None:
        """Moves the correction bias towards even counts of the step (arXiv:2408.15664, algorithm 1).

        The bias of an expert with fewer assignments than the mean rises, that of one with more falls. skipped: whether
        the step changed no parameter, bool; the bias then keeps its value too.
        """
        bias = self.router.e_score_correction_bias
        counts = None if self.step_counts is None else self.step_counts.take()
        if bias is None or counts is None:
            return
        missing = torch.sign(counts.sum() - counts * self.count)
        bias += torch.where(skipped.to(bias.device), 0.0, self.mixture.bias_rate * missing.to(bias.dtype))

    def add_bias(self, total: Tensor) -> Tensor:
        """Returns its input: the biases of experts, if they have any, are in the term of each rank."""
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

    Its number of outputs does not depend on the width, so to muP it is an output layer. The correction bias [e] is a
    buffer: it has no gradient, and no optimizer and no partition of ZeRO knows it. It is in fp32 at least, since its
    changes are small beside it.
    """

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        self.layer = _Fp32Linear(spec, source.of("layer"))
        self.multiplier = spec.multipliers.router
        balanced = spec.dims.mixture.correction_bias
        self.register_buffer(CORRECTION_BIAS, torch.zeros(spec.dims.mixture.experts) if balanced else None)
        self.e_score_correction_bias: Tensor | None

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, h] -> [n, all experts]."""
        logits: Tensor = self.layer(tokens)
        return logits if self.multiplier == 1.0 else logits * self.multiplier

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterLayer:
        """Moves to another device or type, except that the bias stays in fp32."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(moved.device, torch.promote_types(moved.dtype, torch.float32))
        return self


class _Fp32Linear(nn.Module):
    """A linear layer in fp32 at least: ``weight`` [all experts, h], ``bias`` [all experts] or None."""

    def __init__(self, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        shape = (spec.dims.mixture.experts, spec.dims.hidden_size)
        self.weight = source.replicated("weight", shape, spec.init_fn, full_sequence=True)
        self.bias = (
            source.replicated("bias", shape[:1], zeros, full_sequence=True) if spec.dims.mixture.router_bias else None
        )

    def forward(self, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.linear(tokens.to(wide), self.weight.to(wide), bias)
