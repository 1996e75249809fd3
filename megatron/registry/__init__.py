"""Registry: maps every component name accepted in the configuration to `module:attribute`.

A registry belongs to one configuration key. An entry holds the target `module:attribute`, one line of documentation
and the metadata that other code needs without importing the component: the tensors of a norm, the settings of an
optimizer, the size of a tokenizer. Targets are imported on first use, so the launcher can reject a misspelt name, with
the nearest one, without torch.

A new component is one new file and one entry here. Packages outside this tree register theirs, see `registry.py`.
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
from megatron.registry.model import (
    ACTIVATIONS,
    ATTENTION,
    BALANCES_ITSELF,
    BIDIRECTIONAL,
    CAUSAL,
    FULL_ATTENTION,
    INITS,
    LEARNABLE,
    LINEAR_BIAS,
    LINEAR_HEAD,
    MASKED_HEAD,
    MLPS,
    NORMS,
    OFF_BY_ONE,
    ONE_PLUS,
    POSITIONS,
    ROUTERS,
    STANDALONE_BLOCK,
    TE_LAYERS,
    VANILLA,
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
from megatron.registry.registry import PLUGINS, Registry, load_target, nearest_name
from megatron.registry.training import OBJECTIVES, SCHEDULES, SINKS, TOKENIZERS

__all__ = [
    "ACTIVATIONS",
    "ADAM_STATE",
    "ATTENTION",
    "BALANCES_ITSELF",
    "BIDIRECTIONAL",
    "CAUSAL",
    "COMPRESSED_COMM",
    "CPU_OFFLOAD",
    "EIGHT_BIT",
    "ENTRYWISE",
    "FULL_ATTENTION",
    "HANDLES_ZERO1",
    "INITS",
    "LEARNABLE",
    "LINEAR_BIAS",
    "LINEAR_HEAD",
    "MASKED_HEAD",
    "MLPS",
    "NEEDS_FULL_TENSORS",
    "NORMS",
    "OBJECTIVES",
    "OFF_BY_ONE",
    "ONE_PLUS",
    "OPTIMIZERS",
    "PLUGINS",
    "POSITIONS",
    "PROPORTIONAL",
    "ROUTERS",
    "SCHEDULES",
    "SINKS",
    "STANDALONE_BLOCK",
    "TE_LAYERS",
    "TOKENIZERS",
    "VANILLA",
    "WITHOUT_ATTENTION",
    "ActivationEntry",
    "Entry",
    "NormEntry",
    "OptimizerEntry",
    "PositionEntry",
    "Registry",
    "ScheduleEntry",
    "Setting",
    "SinkEntry",
    "TensorSpec",
    "TokenizerEntry",
    "load_target",
    "nearest_name",
]
