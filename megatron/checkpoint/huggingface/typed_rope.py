"""Rotary positions that differ between blocks with a window and blocks without, between our keys and config.json.

transformers 5 keeps a block for each kind of block in `rope_parameters`; before, `rope_theta` and `rope_scaling` were
those of the blocks without a window, and a key of the family the base of the others. Both are written, which agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.config_defaults import DEFAULTS
from megatron.checkpoint.huggingface.family import Settings
from megatron.checkpoint.huggingface.rope_config import CONFIG, meaning_of_block, scaling_block
from megatron.checkpoint.huggingface.sliding_window import FULL, SLIDING
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.layer_types import LayerOptions


def typed_rope(theirs: Mapping[str, Any], local_base: str | None) -> dict[str, Settings]:
    """Returns rotary_emb_base and rope_scaling of each kind of block. Raises ConfigError where spellings contradict.

    Args:
        theirs: config.json, completed.
        local_base: The key of the base of blocks with a window; None where it is that of all.
    """
    blocks = theirs.get("rope_parameters") or {}
    if not isinstance(blocks, Mapping) or not set(blocks) <= {FULL, SLIDING}:
        what = f"only a block for each of {FULL} and {SLIDING} can be taken over"
        raise ConfigError.of(what, key="rope_parameters", value=blocks, location=CONFIG)
    given = {kind: dict(blocks.get(kind) or {}) for kind in (FULL, SLIDING)}
    usual = DEFAULTS[theirs["model_type"]]
    for kind, key in ((FULL, "rope_theta"), (SLIDING, local_base or "rope_theta")):
        said = theirs.get(key)
        if "rope_theta" not in given[kind]:
            given[kind]["rope_theta"] = said or usual[key]
            if kind == SLIDING and local_base is None and said not in (None, usual[key]):
                what = "releases of transformers give blocks with a window this base, or that of the class"
                hint = "say it in rope_parameters, for each kind of block"
                raise ConfigError.of(what, key=key, value=said, location=CONFIG, hint=hint)
        elif said not in (None, given[kind]["rope_theta"]) and not (kind == SLIDING and local_base is None):
            what = f"it contradicts rope_parameters, where {kind} has {given[kind]['rope_theta']}"
            raise ConfigError.of(what, key=key, value=said, location=CONFIG, hint="say it once")
    meanings = {kind: meaning_of_block(theirs, block, "rope_theta") for kind, block in given.items()}
    if theirs.get("rope_scaling"):
        other = meaning_of_block(
            theirs, {**theirs["rope_scaling"], "rope_theta": given[FULL]["rope_theta"]}, "rope_theta"
        )
        if blocks.get(FULL) and other != meanings[FULL]:
            what = f"it contradicts rope_parameters = {dict(blocks)!r}"
            raise ConfigError.of(what, key="rope_scaling", value=theirs["rope_scaling"], location=CONFIG)
        meanings[FULL] = other
    for kind, settings in meanings.items():
        if settings.pop("rotary_pct") != 1.0:
            what = "only positions on whole heads can be taken over"
            raise ConfigError.of(what, key="rope_parameters", value=blocks.get(kind), location=CONFIG)
    return meanings


def _of_kinds(model: ModelSection) -> dict[str, LayerOptions]:
    """Returns what our blocks of each kind have; where there are none of a kind, what the model has."""
    own = LayerOptions(None, model.rotary_emb_base, None)
    found = {FULL: LayerOptions(None, model.rotary_emb_base, model.rope_scaling), SLIDING: own}
    for block in model.block_options:
        found[FULL if block.sliding_window_width is None else SLIDING] = block
    return found


def typed_rope_misfits(model: ModelSection, family: str, *, own_base: bool) -> list[ConfigIssue]:
    """What of our blocks' positions such a family cannot say in every release.

    Args:
        model: The model section.
        family: Its name, for messages.
        own_base: Whether blocks with a window have a base of their own.
    """
    found, errors = _of_kinds(model), []
    values = model.layer_type_options
    for block in model.block_options:
        kind = FULL if block.sliding_window_width is None else SLIDING
        if block != found[kind] or not block.rotary:
            what = f"blocks of a {family} model with a window have the same rotary positions, and those without too"
            errors.append(ConfigIssue(what, key="layer_type_options", value=values))
            break
    if found[SLIDING].rope_scaling is not None:
        what = f"blocks of a {family} model with a window have no scaling of positions"
        errors.append(ConfigIssue(what, key="rope_scaling", value=found[SLIDING].rope_scaling))
    if not own_base and found[SLIDING].rotary_emb_base != found[FULL].rotary_emb_base:
        what = f"all blocks of a {family} model have one base"
        errors.append(ConfigIssue(what, key="layer_type_options", value=values))
    return errors


def typed_rope_config(model: ModelSection, local_base: str | None) -> Settings:
    """Returns both spellings. local_base: as for typed_rope."""
    found = _of_kinds(model)
    scaling = scaling_block(found[FULL].rope_scaling)
    full, local = (float(found[kind].rotary_emb_base) for kind in (FULL, SLIDING))
    blocks = {
        FULL: {"rope_theta": full, **(scaling or {"rope_type": "default"})},
        SLIDING: {"rope_theta": local, "rope_type": "default"},
    }
    settings: Settings = {"rope_theta": full, "rope_scaling": scaling, "rope_parameters": blocks}
    return settings | ({} if local_base is None else {local_base: local})
