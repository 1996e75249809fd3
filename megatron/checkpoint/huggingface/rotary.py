"""Rotary positions and their scaling, between our keys and config.json.

transformers keeps base, part and scaling in `rope_parameters`, and before release 5 as `rope_theta`, `rope_scaling` and
a key of each family; both spellings are read, and the older one is written, which every release reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.family import Settings
from megatron.config.sections.model import ModelSection
from megatron.errors import ConfigError, Mistake

_BESIDE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_DEFAULTS = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
"""What we may leave out and they must say."""


def scaling_misfits(model: ModelSection) -> list[Mistake]:
    """What of rope_scaling config.json cannot say: angles that follow from the length of each text."""
    scaling = model.rope_scaling or {}
    if scaling.get("type") != "dynamic":
        return []
    original = scaling["original_max_position_embeddings"]
    if model.seq_length is not None and model.seq_length <= original and model.max_position_embeddings == original:
        return []
    return [
        Mistake(
            "transformers chooses the base by the length of each text, not by seq_length; the two agree only where "
            "max_position_embeddings is original_max_position_embeddings",
            key="rope_scaling",
            value=dict(scaling),
        )
    ]


def scaling_config(model: ModelSection) -> Settings:
    """Their rope_scaling, or nothing."""
    if not model.rope_scaling:
        return {}
    kind = model.rope_scaling["type"]
    told = {"rope_type": kind, **_DEFAULTS.get(kind, {})}
    told |= {name: value for name, value in model.rope_scaling.items() if name != "type"}
    if kind == "dynamic":
        del told["original_max_position_embeddings"]  # it is max_position_embeddings there
    return {"rope_scaling": told}


def rotary_settings(theirs: Mapping[str, Any], *, base: str, part: str = "", usual: float = 1.0) -> Settings:
    """rotary_emb_base, rotary_pct and rope_scaling from either spelling.

    base, part: their names among the older keys. usual: the part where neither says one. Raises ConfigError for a base
    that is no whole number; resolving judges what a scaling says.
    """
    nested, older = theirs.get("rope_parameters") or {}, theirs.get("rope_scaling") or {}
    scaling = {**older, **nested}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = nested.get("rope_theta", theirs.get(base, 10000))
    if theta != int(theta):
        raise ConfigError.of("the base must be a whole number", key=base, value=theta, where="config.json")
    settings: Settings = {
        "rotary_emb_base": int(theta),
        "rotary_pct": float(nested.get("partial_rotary_factor", theirs.get(part, usual))),
    }
    if kind != "default":
        told = {name: value for name, value in scaling.items() if name not in _BESIDE and value is not None}
        if kind == "dynamic":
            told["original_max_position_embeddings"] = theirs["max_position_embeddings"]
        settings["rope_scaling"] = {"type": kind, **told}
    return settings
