"""The figures that a plan consists of."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.config import Config
from megatron.plan.memory import Memory


@dataclass(frozen=True)
class Figures:
    """What a run will be. The sizes are those of the configuration.

    parameters, flops_per_iteration and memory are None where the vocabulary is not known; `unknown` then says why.
    trainable: of the parameters, where others are frozen. memory: that of the rank that needs most. budget [bytes]:
    from gpu_memory. advice: what to change when it is exceeded. stages: first layer of each pipeline stage, and the
    number of layers at the end.
    """

    config: Config
    vocabulary: str
    parameters: int | None = None
    trainable: int | None = None
    flops_per_iteration: int | None = None
    memory: Memory | None = None
    unknown: str | None = None
    budget: int | None = None
    advice: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    not_supported_yet: tuple[str, ...] = field(default=())
