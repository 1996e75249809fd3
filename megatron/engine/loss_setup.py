"""What computes and reports the losses of a run, from its sections of the configuration."""

from __future__ import annotations

from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.distributed.mesh import Axis
from megatron.model.loss_function import LossFunction
from megatron.model.loss_parts import LossParts
from megatron.model.moe.losses import RouterLossTracker
from megatron.model.multi_token import FurtherLosses, part_name
from megatron.objectives.classification import Classification, ClassScores
from megatron.registry import OBJECTIVES


def router_losses(moe: MoeSection) -> RouterLossTracker | None:
    """Returns the tracker of router losses; None if no block has experts."""
    return RouterLossTracker.of(moe) if moe.moe_num_experts > 1 else None


def loss_function(
    train_impl: str,
    axis: Axis,
    vocab_size: int | None,
    *,
    fused: bool,
    choices: int = 1,
    scores: ClassScores | None = None,
) -> LossFunction:
    """Returns the objective as the engines call it.

    Args:
        train_impl: name of the objective.
        axis: tensor-parallel ranks.
        vocab_size: number of tokens; logits past them get no probability.
        fused: compute the output layer and the loss together where the objective can.
        choices: answers of a question of a multiple-choice task.
        scores: receives the logits of a classifier's evaluations.
    """
    kind = OBJECTIVES.load(train_impl)
    objective = kind(choices, scores) if kind is Classification else kind()
    return LossFunction(objective, axis, vocab_size, fused=fused)


def loss_parts(model: ModelSection) -> LossParts | None:
    """Returns what collects losses beside that of tokens; None for a model that has none."""
    depths = model.mtp_num_layers or 0
    if depths:
        return LossParts(tuple(map(part_name, range(1, depths + 1))), model.mtp_loss_scaling_factor / depths)
    return LossParts() if model.bert_binary_head else None


def further_losses(model: ModelSection, parts: LossParts | None) -> FurtherLosses | None:
    """Returns the losses of modules that predict further tokens; None for a model without them. parts: as above."""
    return FurtherLosses(model.mtp_loss_scaling_factor, parts) if model.mtp_num_layers else None
