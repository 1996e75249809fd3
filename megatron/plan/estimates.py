"""The figures of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.config import Config
from megatron.plan.memory import Memory


@dataclass(frozen=True)
class PlanFigures:
    """Figures of a run."""

    config: Config
    """The configuration."""
    vocabulary: str
    """Size and source of the vocabulary."""
    parameters: int | None = None
    """Parameters of the model; None if the vocabulary is not known."""
    trainable: int | None = None
    """Trainable parameters, where others are frozen."""
    flops_per_iteration: int | None = None
    """FLOPs of one iteration; None if the vocabulary is not known."""
    memory: Memory | None = None
    """Memory of the rank that needs most; None if the vocabulary is not known."""
    unknown: str | None = None
    """The reason why figures are None."""
    budget: int | None = None
    """The key gpu_memory [bytes]."""
    advice: tuple[str, ...] = ()
    """Suggested changes when the budget is exceeded."""
    stages: tuple[int, ...] = ()
    """First layer of each pipeline stage, and the number of layers."""
    warnings: tuple[str, ...] = field(default=())
    """Values without effect."""
    not_supported_yet: tuple[str, ...] = field(default=())
    """Values whose feature is not built."""
