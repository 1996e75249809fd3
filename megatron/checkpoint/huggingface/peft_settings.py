"""adapter_config.json of `peft`, with its defaults where a setting is absent, and refusals of what is no plain update.

Source of names, defaults and patterns: peft 0.21, tuners/lora/config.py, tuners/lora/layer.py and utils/other.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.format import files
from megatron.errors import ConfigError, ConfigIssue

CONFIG = "adapter_config.json"
_UNREAD: Mapping[str, object] = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "layer_replication": None,
    "trainable_token_indices": None,
}
"""Settings with which an update is what it is here -> that value; absent ones have it."""
_START = "init_lora_weights"
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")
"""How A and B may start beside weights that stay as they are; true and false are others."""
_DEFAULT_RANK = _DEFAULT_ALPHA = 8


@dataclass(frozen=True)
class PeftSettings:
    """What it says of low-rank updates."""

    rank: int
    """Of updates without a rank of their own."""
    alpha: float
    """Of updates without one of their own."""
    rank_stabilized: bool
    """Whether the factor falls with the root of the rank."""
    magnitudes: bool
    """Whether norms of rows are trained (DoRA)."""
    dropout: float
    """On the input of updates [probability]."""
    alphas: Mapping[str, float]
    """Pattern of names of modules -> alpha, the first that matches."""
    ranks: Mapping[str, int]
    """Pattern of names of modules -> rank, the first that matches."""
    parameters: tuple[str, ...]
    """Ends of the names of parameters that have updates without a linear layer around them."""
    saved: tuple[str, ...]
    """Ends of the names of modules that were replaced by trained copies."""
    ties: bool
    """Whether copies of tied modules are tied too."""

    @staticmethod
    def read(path: Path) -> PeftSettings:
        """Reads the file of a folder. Raises ConfigError for other adapters than plain low-rank updates."""
        location = str(path / CONFIG)
        found = files.read_object(path / CONFIG)
        ConfigError.raise_any(_issues(found, location))
        saved = found.get("modules_to_save") or ()
        return PeftSettings(
            rank=found.get("r", _DEFAULT_RANK),
            alpha=found.get("lora_alpha", _DEFAULT_ALPHA),
            rank_stabilized=bool(found.get("use_rslora")),
            magnitudes=bool(found.get("use_dora")),
            dropout=float(found.get("lora_dropout") or 0.0),
            alphas=found.get("alpha_pattern") or {},
            ranks=found.get("rank_pattern") or {},
            parameters=tuple(sorted(found.get("target_parameters") or ())),
            saved=tuple([saved] if isinstance(saved, str) else saved),
            ties=bool(found.get("ensure_weight_tying")),
        )

    def factor(self, module: str, rank: int) -> float:
        """Returns the factor of an update: alpha / rank, or over its root.

        module: its name in the model, which the first pattern that matches decides by. rank: its own.
        """
        module = f"{module}.weight" if self.targets_parameter(f"{module}.weight") else module
        alpha = _first_matching(self.alphas, module, self.alpha)
        return float(alpha / (math.sqrt(rank) if self.rank_stabilized else rank))

    def rank_of(self, module: str) -> int:
        """Returns the rank that a module of the model has by this file. module: its name in the model."""
        return int(_first_matching(self.ranks, module, self.rank))

    def targets_parameter(self, name: str) -> bool:
        """Returns whether a parameter of the model is one of `target_parameters`."""
        return any(f".{name}".endswith(f".{ending}") for ending in self.parameters)

    @property
    def usual_factor(self) -> float:
        """The factor of updates without a rank and an alpha of their own."""
        return float(self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank))

    def replaces(self, module: str) -> bool:
        """Returns whether a module has a trained copy of its own, so that another it was tied to is not changed."""
        return not self.ties and module.endswith(self.saved)


def _first_matching(patterns: Mapping[str, float], module: str, usual: float) -> float:
    """Returns the value of the first pattern that matches the end of a module's name, else the usual one."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), usual)


def _issues(found: Mapping[str, Any], location: str) -> Iterator[ConfigIssue]:
    for key, usual in _UNREAD.items():
        if found.get(key, usual) not in (usual, None, False, []):
            yield ConfigIssue(f"only {usual!r} can be taken over", key=key, value=found[key], location=location)
    start = found.get(_START)
    if start is not None and not isinstance(start, bool) and str(start).lower() not in _PLAIN_STARTS:
        yield ConfigIssue(
            "with it peft changes the model's weights before it adds the update; "
            f"true, false, {', '.join(_PLAIN_STARTS)} leave them as they are",
            key=_START,
            value=start,
            location=location,
            hint="convert it to a plain update by save_pretrained(..., path_initial_model_for_weight_conversion=...) "
            "of peft; where --input-dir holds the weights without the first B A, write init_lora_weights: true",
        )
    rank, alpha = found.get("r", _DEFAULT_RANK), found.get("lora_alpha", _DEFAULT_ALPHA)
    if not isinstance(rank, int) or rank < 1:
        yield ConfigIssue("the rank must be at least 1", key="r", value=rank, location=location)
    if not isinstance(alpha, (int, float)) or alpha <= 0:
        yield ConfigIssue("this must be a number above 0", key="lora_alpha", value=alpha, location=location)
    for key in ("alpha_pattern", "rank_pattern"):
        for pattern, value in (found.get(key) or {}).items():
            if not isinstance(value, (int, float)) or not _is_pattern(pattern):
                what = "this must be a regular expression and a number"
                yield ConfigIssue(what, key=key, value={pattern: value}, location=location)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
