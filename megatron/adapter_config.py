"""Settings of LoRA and soft prompts, read from the configuration without torch.

`lora`: each targeted matrix W becomes W + (alpha / rank) B A, where A [rank, in] and B [out, rank] are trained and B
starts at zero (arXiv:2106.09685, section 4.1); with `rslora` the factor is alpha / sqrt(rank), and with `dora` each row
is scaled to a trained norm. The matrices that
`modules_to_save` names, as peft calls it, are trained beside them as they are. `soft_prompt_tuning`: only vectors in
front of the tokens are trained (arXiv:2104.08691, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IN_PROJ, OUT_PROJ = "in_proj", "out_proj"
"""The targets of Mamba and of gated delta nets; `all` names them for models that have them."""
TIME_MIXING, CHANNEL_MIXING, GMLP = "time_mixing", "channel_mixing", "gmlp"
"""The targets of RWKV and of gMLP; `all` names them for models that have them."""
EXPERTS_IN, EXPERTS_OUT = "experts_h_to_4h", "experts_4h_to_h"
"""The targets of experts: one A and one B for each of a block. `all` does not name them."""
EXPERTS = "experts"
"""Short for both."""
SHARED_IN, SHARED_OUT = "shared_h_to_4h", "shared_4h_to_h"
"""The targets of the experts that every token goes through. `all` does not name them."""
SHARED = "shared_experts"
"""Short for both."""
SHORT = {EXPERTS: (EXPERTS_IN, EXPERTS_OUT), SHARED: (SHARED_IN, SHARED_OUT)}
"""Name that stands for several targets -> these."""
TARGETS = {
    "query_key_value": ("attention.query_key_value",),
    "output_gate": ("attention.output_gate",),
    "dense": ("attention.dense",),
    "dense_h_to_4h": ("mlp.linear1",),
    "dense_4h_to_h": ("mlp.linear2",),
    EXPERTS_IN: ("mlp.experts.mlp.w1", "mlp.experts.mlp.w3"),
    EXPERTS_OUT: ("mlp.experts.mlp.w2",),
    SHARED_IN: ("mlp.shared_experts.linear1",),
    SHARED_OUT: ("mlp.shared_experts.linear2",),
    IN_PROJ: ("mixer.in_proj", "attention.in_proj"),
    OUT_PROJ: ("mixer.out_proj",),
    TIME_MIXING: ("att.receptance", "att.key", "att.value", "att.gate", "att.output"),
    CHANNEL_MIXING: ("ffn.key", "ffn.receptance", "ffn.value"),
    GMLP: ("input_linear", "output_linear"),
}
"""The matrices that `lora` may target: name -> modules inside its block, by the kind of the block."""
MODULES = {module: name for name, modules in TARGETS.items() for module in modules}
"""Module inside a block -> its name among the targets."""
GATE = "output_gate"
"""The target that only models with `attention_output_gate` have; `all` names it for those."""
APART = (IN_PROJ, OUT_PROJ, TIME_MIXING, CHANNEL_MIXING, GMLP, EXPERTS_IN, EXPERTS_OUT, SHARED_IN, SHARED_OUT)
"""The targets beside those of attention and MLPs."""
SPECIAL = (GATE, *APART)
"""The targets that only some models have."""
EMBEDDING, HEAD = "embedding", "head"
SAVED = (EMBEDDING, HEAD)
"""The names of `modules_to_save`: the word embedding and the output layer."""
ALL = "all"
ALIASES = {"linear1": "dense_h_to_4h", "linear2": "dense_4h_to_h"}

Block = Mapping[str, Any]


@dataclass(frozen=True)
class LowRank:
    """LoRA adapters."""

    rank: int
    """Rows of A and columns of B."""
    alpha: float
    """Scale of the product B A, times the rank."""
    dropout: float
    """Dropout on the adapter's input [probability]."""
    targets: tuple[str, ...]
    """Names of TARGETS, in that order."""
    modules_to_save: tuple[str, ...] = ()
    """Names of SAVED that are trained beside the adapters, in that order."""
    rank_stabilized: bool = False
    """True if the scale falls with the root of the rank (arXiv:2312.03732)."""
    magnitudes: bool = False
    """True if the norm of each row of W + scale B A is trained too (DoRA, arXiv:2402.09353)."""
    base: str | None = None
    """Format of the frozen matrices, a name of FROZEN_FORMATS (QLoRA, arXiv:2305.14314); None for the model's."""

    @property
    def scale(self) -> float:
        """The factor of the product B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def modules(self) -> tuple[str, ...]:
        """Returns the targeted modules inside a block, and the targeted stacks of experts."""
        return tuple(module for name in self.targets for module in TARGETS[name])

    @property
    def of_experts(self) -> bool:
        """Whether experts are targeted."""
        return EXPERTS_IN in self.targets or EXPERTS_OUT in self.targets

    def block(self) -> dict[str, Any]:
        """Returns the configuration's block with all defaults."""
        numbers: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        numbers |= {"rslora": True} if self.rank_stabilized else {}  # absent in earlier checkpoints
        numbers |= {"dora": True} if self.magnitudes else {}
        numbers |= {"base": self.base} if self.base else {}
        return {**numbers, "targets": list(self.targets), "modules_to_save": list(self.modules_to_save)}

    def trained(self, *, tied: bool) -> frozenset[str]:
        """Returns the names of SAVED whose rows are trained. tied: one matrix is both, and either name trains it."""
        return frozenset(SAVED if tied and self.modules_to_save else self.modules_to_save)


@dataclass(frozen=True)
class SoftPrompt:
    """A soft prompt."""

    num_tokens: int
    """Its length [vectors]."""
    init_string: str
    """Text whose token embeddings are the first values, repeated to num_tokens; "" draws random ones."""
    init_range: float
    """Random first values are uniform in +-init_range."""

    def block(self) -> dict[str, Any]:
        """Returns the configuration's block with all defaults."""
        return {"enabled": True, **vars(self)}


def low_rank(block: Block | None) -> LowRank | None:
    """Reads a valid `lora` block; None when it is absent or disabled."""
    if block is None or not enabled(block):
        return None
    named, trained = targets(block), modules_to_save(block)
    return LowRank(
        block["rank"],
        float(block.get("alpha") or block["rank"]),
        float(block.get("dropout") or 0.0),
        tuple(name for name in TARGETS if name in named),
        tuple(name for name in SAVED if name in trained),
        block.get("rslora") is True,
        block.get("dora") is True,
        block.get("base"),
    )


def is_in_frozen_format(name: str) -> bool:
    """Returns whether a tensor, by its name in its layer, is stored in the format that `base` names."""
    return name.removesuffix(".weight") in MODULES


def soft_prompt(block: Block | None) -> SoftPrompt | None:
    """Reads a valid `soft_prompt_tuning` block; None when it is absent or disabled."""
    if block is None or not enabled(block):
        return None
    given = {name: block[name] for name in ("num_tokens", "init_string", "init_range") if block.get(name) is not None}
    return SoftPrompt(**{"num_tokens": 10, "init_string": "", "init_range": 0.5, **given})


def prompt_length(block: Block | None) -> int:
    """Returns the vectors of the soft prompt; 0 without one."""
    prompt = soft_prompt(block)
    return 0 if prompt is None else prompt.num_tokens


def enabled(block: Block | None) -> bool:
    """Returns whether a block is given and not disabled."""
    return block is not None and block.get("enabled", True) is not False


def targets(block: Block) -> list[str]:
    """Returns the targets of a `lora` block by their names in TARGETS; query_key_value by default."""
    given = block.get("targets") or "query_key_value"
    listed = [given] if isinstance(given, str) else list(given)
    listed = [full for name in listed for full in SHORT.get(name, (name,))]
    every = [name for name in TARGETS if name not in SPECIAL or name in listed]
    return every if ALL in listed else [ALIASES.get(name, name) for name in listed]


def takes_all(block: Block) -> bool:
    """Returns whether a `lora` block asks for every matrix of the model."""
    given = block.get("targets") or ()
    return ALL in ([given] if isinstance(given, str) else list(given))


def modules_to_save(block: Block) -> list[str]:
    """Returns what a `lora` block trains beside its adapters, by the names of SAVED; nothing by default."""
    given = block.get("modules_to_save") or []
    return [given] if isinstance(given, str) else list(given)
