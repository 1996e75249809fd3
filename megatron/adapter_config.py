"""What is trained beside a frozen model, read from the configuration without torch.

`lora`: each targeted matrix W becomes W + (alpha / rank) B A, where A [rank, in] and B [out, rank] are trained and B
starts at zero (arXiv:2106.09685, section 4.1). `soft_prompt_tuning`: vectors before every text take the place of a
prompt, and they alone are trained (arXiv:2104.08691, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = {
    "query_key_value": "attention.query_key_value",
    "dense": "attention.dense",
    "dense_h_to_4h": "mlp.linear1",
    "dense_4h_to_h": "mlp.linear2",
}
"""The matrices that `lora` may target: name -> the module inside its block."""
ALL = "all"
ALIASES = {"linear1": "dense_h_to_4h", "linear2": "dense_4h_to_h"}

Block = Mapping[str, Any]


@dataclass(frozen=True)
class LowRank:
    """Low-rank updates. dropout: of their input [probability]. targets: names of TARGETS, in that order."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank

    def modules(self) -> tuple[str, ...]:
        """The targeted modules inside a block."""
        return tuple(TARGETS[name] for name in self.targets)

    def block(self) -> dict[str, Any]:
        """The configuration's block with nothing left out."""
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "targets": list(self.targets)}


@dataclass(frozen=True)
class SoftPrompt:
    """A learned prompt. num_tokens: vectors. init_string: they start as the vectors of its tokens, taken again and
    again; without it they are drawn from +-init_range.
    """

    num_tokens: int
    init_string: str
    init_range: float

    def block(self) -> dict[str, Any]:
        """The configuration's block with nothing left out."""
        return {"enabled": True, **vars(self)}


def low_rank(block: Block | None) -> LowRank | None:
    """What a `lora` block without errors asks for; None for nothing."""
    if block is None or not enabled(block):
        return None
    named = targets(block)
    ordered = tuple(name for name in TARGETS if name in named)
    return LowRank(
        block["rank"], float(block.get("alpha") or block["rank"]), float(block.get("dropout") or 0.0), ordered
    )


def soft_prompt(block: Block | None) -> SoftPrompt | None:
    """What a `soft_prompt_tuning` block without errors asks for; None for nothing."""
    if block is None or not enabled(block):
        return None
    given = {name: block[name] for name in ("num_tokens", "init_string", "init_range") if block.get(name) is not None}
    return SoftPrompt(**{"num_tokens": 10, "init_string": "", "init_range": 0.5, **given})


def prompt_length(block: Block | None) -> int:
    """Vectors of the learned prompt; 0 without one."""
    prompt = soft_prompt(block)
    return 0 if prompt is None else prompt.num_tokens


def enabled(block: Block | None) -> bool:
    """Whether a block is there and not switched off."""
    return block is not None and block.get("enabled", True) is not False


def targets(block: Block) -> list[str]:
    """The targets of a `lora` block by their names in TARGETS; the joint matrix of queries, keys and values unless
    given, as in the paper.
    """
    given = block.get("targets") or "query_key_value"
    listed = [given] if isinstance(given, str) else list(given)
    return list(TARGETS) if ALL in listed else [ALIASES.get(name, name) for name in listed]
