"""What computes and reports the losses of a run, from its sections of the configuration."""

from __future__ import annotations

from typing import Any

from megatron.config import Config
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.config.schema.retrieval import RetrievalSection
from megatron.config.validation.unknown_values import require
from megatron.distributed.mesh import Topology
from megatron.model.loss_function import LossFunction
from megatron.model.loss_parts import LossParts
from megatron.model.moe.losses import RouterLossTracker
from megatron.model.multi_token import FurtherLosses, part_name
from megatron.objectives.classification import Classification, ClassScores
from megatron.objectives.retrieval import Retrieval, retrieval_parts
from megatron.registry import OBJECTIVES, RETRIEVAL_HEAD


def router_losses(moe: MoeSection) -> RouterLossTracker | None:
    """Returns the tracker of router losses; None if no block has experts."""
    return RouterLossTracker.of(moe) if moe.moe_num_experts > 1 else None


def loss_function(
    config: Config,
    topology: Topology,
    vocab_size: int | None,
    *,
    parts: LossParts | None = None,
    scores: ClassScores | None = None,
) -> LossFunction:
    """Returns the objective as the engines call it.

    Args:
        config: names the objective and its settings.
        topology: layout of the ranks.
        vocab_size: number of tokens; logits past them get no probability.
        parts: receives the measurements of batches that an objective makes beside its loss.
        scores: receives the logits or embeddings of evaluations.
    """
    objective: Any
    kind = OBJECTIVES.load(config.training.train_impl)
    if kind is Classification:
        objective = kind(config.task.task_choices or 1, scores)
    elif kind is Retrieval:
        section = config.retrieval
        objective = kind(
            require(config.training.train_micro_batch_size_per_gpu),
            topology.data,
            scale=require(config.model.hidden_size) ** -0.5 if section.retrieval_score_scaling else 1.0,
            tops=section.retrieval_report_topk_accuracies,
            parts=parts,
            scores=scores,
        )
    else:
        objective = kind()
    return LossFunction(objective, topology.model, vocab_size, fused=config.kernels.fused_linear_cross_entropy)


def loss_parts(model: ModelSection, retrieval: RetrievalSection) -> LossParts | None:
    """Returns what collects losses beside that of tokens; None for a model that has none.

    model: its section. retrieval: names the measurements of encoders of queries and passages.
    """
    if model.lm_head == RETRIEVAL_HEAD:
        return retrieval_parts(retrieval.retrieval_report_topk_accuracies)
    depths = model.mtp_num_layers or 0
    if depths:
        return LossParts(tuple(map(part_name, range(1, depths + 1))), model.mtp_loss_scaling_factor / depths)
    return LossParts() if model.bert_binary_head else None


def further_losses(model: ModelSection, parts: LossParts | None) -> FurtherLosses | None:
    """Returns the losses of modules that predict further tokens; None for a model without them. parts: as above."""
    return FurtherLosses(model.mtp_loss_scaling_factor, parts) if model.mtp_num_layers else None
