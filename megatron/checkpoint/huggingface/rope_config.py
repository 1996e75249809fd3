"""Rotary positions and their scaling, between our keys and config.json.

transformers keeps base, part and scaling in `rope_parameters`, and before release 5 as `rope_theta`, `rope_scaling` and
a key of each family; both spellings are read, and the older one is written, which every release reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.config_defaults import DEFAULTS
from megatron.checkpoint.huggingface.family import Settings
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue

CONFIG = "config.json"
_BESIDE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_DEFAULTS = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
"""What we may leave out and they must say."""


def scaling_misfits(model: ModelSection) -> list[ConfigIssue]:
    """What of rope_scaling config.json cannot say: angles that follow from the length of each text."""
    scaling = model.rope_scaling or {}
    if scaling.get("type") != "dynamic":
        return []
    original = scaling["original_max_position_embeddings"]
    if model.seq_length is not None and model.seq_length <= original and model.max_position_embeddings == original:
        return []
    return [
        ConfigIssue(
            "transformers chooses the base by the length of each text, not by seq_length; the two agree only where "
            "max_position_embeddings is original_max_position_embeddings",
            key="rope_scaling",
            value=dict(scaling),
        )
    ]


def scaling_config(model: ModelSection) -> Settings:
    """Their rope_scaling, or nothing."""
    scaling = scaling_block(model.rope_scaling)
    return {} if scaling is None else {"rope_scaling": scaling}


def scaling_block(ours: Mapping[str, Any] | None) -> Settings | None:
    """Returns their block of a scaling of ours, or None."""
    if not ours:
        return None
    kind = ours["type"]
    scaling = {"rope_type": kind, **_DEFAULTS.get(kind, {})}
    scaling |= {name: value for name, value in ours.items() if name != "type"}
    if kind == "dynamic":
        del scaling["original_max_position_embeddings"]  # it is max_position_embeddings there
    return scaling


def rotary_settings(theirs: Mapping[str, Any], *, base: str, part: str = "partial_rotary_factor") -> Settings:
    """rotary_emb_base, rotary_pct and rope_scaling from either spelling.

    theirs: completed. base, part: their names among the older keys. Raises ConfigError where two spellings contradict
    each other, which every release of transformers settles in its own way, where blocks turn in different ways, and
    for a base that is no whole number; resolving judges what a scaling says.
    """
    said = {name: theirs[name] for name in ("rope_scaling", "rope_parameters") if theirs.get(name)}
    for name, block in said.items():
        if not isinstance(block, Mapping) or any(isinstance(value, Mapping) for value in block.values()):
            what = "only one scaling for all blocks can be taken over"
            raise ConfigError.of(what, key=name, value=block, location=CONFIG)
    meanings = {name: meaning_of_block(theirs, block, base, part) for name, block in said.items()}
    if len(meanings) > 1 and meanings["rope_scaling"] != meanings["rope_parameters"]:
        raise ConfigError.of(
            f"it contradicts rope_parameters = {said['rope_parameters']!r}",
            key="rope_scaling",
            value=said["rope_scaling"],
            location=CONFIG,
            hint="say it once: put the scaling into rope_parameters, with its rope_theta, and remove rope_scaling",
        )
    settings = next(iter(meanings.values()), None) or meaning_of_block(theirs, {}, base, part)
    _one_base(theirs, settings)
    return settings


def usual_rotary(theirs: Mapping[str, Any], usual: Mapping[str, Any]) -> Settings:
    """Returns our keys of rotary positions of a class that scales them where config.json does not say how.

    Raises ConfigError where a null scaling means one thing here and another there. theirs: completed. usual: scaling of
    the class.
    """
    named = [key for key in ("rope_parameters", "rope_scaling") if key in theirs]
    if named and not any(theirs[key] for key in named):
        what = "releases of transformers take this for no scaling, or for that of the public models"
        hint = "write rope_scaling: {rope_type: default}, or the scaling"
        raise ConfigError.of(what, key=named[0], value=None, location=CONFIG, hint=hint)
    found = rotary_settings(theirs if named else {**theirs, "rope_scaling": usual}, base="rope_theta")
    if found["rotary_pct"] != 1.0:
        what = "only positions of full heads can be taken over"
        raise ConfigError.of(what, key="partial_rotary_factor", value=found["rotary_pct"], location=CONFIG)
    return found


def meaning_of_block(
    theirs: Mapping[str, Any], block: Mapping[str, Any], base: str, part: str = "partial_rotary_factor"
) -> Settings:
    """Returns our keys of one block, and of the keys beside it.

    Args:
        theirs: config.json, completed.
        block: rope_parameters or rope_scaling.
        base: Name of the base among the older keys.
        part: Name of the rotated part there.
    """
    usual = DEFAULTS[theirs["model_type"]]
    theta = block.get("rope_theta", theirs.get(base, usual[base]))
    if not isinstance(theta, (int, float)) or not float(theta).is_integer() or theta < 1:
        raise ConfigError.of("the base must be a whole number", key=base, value=theta, location=CONFIG)
    turned = block.get("partial_rotary_factor")
    settings: Settings = {
        "rotary_emb_base": int(theta),
        "rotary_pct": float(theirs.get(part, usual.get(part, 1.0)) if turned is None else turned),
    }
    kind = block.get("rope_type") or block.get("type") or "default"
    if kind == "default":
        return settings
    scaling = {name: value for name, value in block.items() if name not in _BESIDE and value is not None}
    length = theirs["max_position_embeddings"]
    if kind == "dynamic":
        scaling["original_max_position_embeddings"] = length
    elif kind in ("yarn", "llama3"):
        scaling.setdefault("original_max_position_embeddings", length)
        beside = theirs.get("original_max_position_embeddings")
        if beside not in (None, scaling["original_max_position_embeddings"]):
            raise ConfigError.of(
                f"the scaling has {scaling['original_max_position_embeddings']}",
                key="original_max_position_embeddings",
                value=beside,
                location=CONFIG,
            )
    return settings | {"rope_scaling": {"type": kind, **scaling}}


def _one_base(theirs: Mapping[str, Any], settings: Settings) -> None:
    """ConfigError for a key beside the block that says something else, or that only some releases read."""
    ours = {"rotary_emb_base": ("rope_theta", "rotary_emb_base"), "rotary_pct": ("partial_rotary_factor", "rotary_pct")}
    for mine, names in ours.items():
        for name in names:
            value = theirs.get(name)
            if value is None or value == settings[mine]:
                continue
            raise ConfigError.of(
                f"it contradicts {settings[mine]!r}, which the rest of the file says",
                key=name,
                value=value,
                location=CONFIG,
                hint="say it once",
            )
