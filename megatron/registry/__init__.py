"""Every name that a configuration may give to a part, and the module that builds it.

A family is what one configuration key chooses from. An entry holds the target `module:attribute`, one line of
documentation, and all that the rest of the code must know of the part without importing it: the tensors of a norm, the
settings of an optimizer, the size of a tokenizer. Targets are imported on first use, so the launcher can refuse a
misspelt name, with the nearest one, without torch.

A new part is one new file and one entry here. Packages outside this tree register theirs, see `family.py`.
"""

from megatron.registry.entry import (
    ActivationEntry,
    Entry,
    NormEntry,
    OptimizerEntry,
    PositionEntry,
    ScheduleEntry,
    Setting,
    SinkEntry,
    TensorSpec,
    TokenizerEntry,
)
from megatron.registry.family import PLUGINS, Family, load_target, nearest_name
from megatron.registry.model import (
    ACTIVATIONS,
    ATTENTION,
    INITS,
    MLPS,
    NORMS,
    POSITIONS,
    ROUTERS,
    TE_LAYERS,
    WHOLE_BLOCK,
    WITHOUT_ATTENTION,
)
from megatron.registry.optimizers import (
    ADAM_STATE,
    COMPRESSED_COMM,
    CPU_OFFLOAD,
    EIGHT_BIT,
    ENTRYWISE,
    HANDLES_ZERO1,
    NEEDS_FULL_TENSORS,
    OPTIMIZERS,
    PROPORTIONAL,
)
from megatron.registry.training import OBJECTIVES, SCHEDULES, SINKS, TOKENIZERS

__all__ = [
    "ACTIVATIONS",
    "ADAM_STATE",
    "ATTENTION",
    "COMPRESSED_COMM",
    "CPU_OFFLOAD",
    "EIGHT_BIT",
    "ENTRYWISE",
    "HANDLES_ZERO1",
    "INITS",
    "MLPS",
    "NEEDS_FULL_TENSORS",
    "NORMS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "PLUGINS",
    "POSITIONS",
    "PROPORTIONAL",
    "ROUTERS",
    "SCHEDULES",
    "SINKS",
    "TE_LAYERS",
    "TOKENIZERS",
    "WHOLE_BLOCK",
    "WITHOUT_ATTENTION",
    "ActivationEntry",
    "Entry",
    "Family",
    "NormEntry",
    "OptimizerEntry",
    "PositionEntry",
    "ScheduleEntry",
    "Setting",
    "SinkEntry",
    "TensorSpec",
    "TokenizerEntry",
    "load_target",
    "nearest_name",
]
