"""The window of attention that config.json gives each block, as one for all of ours or as types of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.checkpoint.huggingface.family import Settings
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue

FULL, SLIDING = "full_attention", "sliding_attention"


def one_window(theirs: Mapping[str, Any], window: int | None, kinds: Sequence[str]) -> Settings:
    """sliding_window_width, or nothing where every block sees all earlier positions; types where some have a window.

    theirs: completed. window: what the blocks of kind `sliding_attention` see [tokens]; None where there is none.
    kinds: what the family makes of the blocks, one each. A window as long as the longest sequence is none. Raises
    ConfigError where the file's own `layer_types` says otherwise.
    """
    layer_types = theirs.get("layer_types")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ConfigError.of("it must be at least 1", key="sliding_window", value=window, location="config.json")
    seen = set(kinds if layer_types is None else layer_types)
    if layer_types is not None and (len(layer_types) != theirs["num_hidden_layers"] or seen - {FULL, SLIDING}):
        what = f"only one of {FULL} and {SLIDING} for each of {theirs['num_hidden_layers']} layers can be taken over"
        raise ConfigError.of(what, key="layer_types", value=layer_types, location="config.json")
    if layer_types is not None and list(layer_types) != list(kinds):
        what = f"blocks of this model are of kind {', '.join(sorted(set(kinds)))}"
        raise ConfigError.of(what, key="layer_types", value=layer_types, location="config.json")
    if SLIDING in seen and window is None:
        what = "no window is given for them: sliding_window is null or not in use"
        raise ConfigError.of(what, key="layer_types", value=layer_types, location="config.json")
    if SLIDING not in seen or (window is not None and window >= theirs["max_position_embeddings"]):
        return {}
    if FULL in seen:
        return typed_blocks(kinds, {SLIDING: {"sliding_window_width": window}, FULL: {}})
    return {"sliding_window_width": window}


def typed_blocks(kinds: Sequence[str], options: Mapping[str, Settings]) -> Settings:
    """Returns the keys of blocks of several types. kinds: the type of each block. options: of each type."""
    used = {kind: dict(options[kind]) for kind in options if kind in kinds}
    return {"layer_types": list(kinds), "layer_type_options": used}


def listed_kinds(theirs: Mapping[str, Any], usual: Sequence[str]) -> list[str]:
    """Returns the kind of each block that config.json lists, else the usual ones. ConfigError for others.

    theirs: completed. usual: what the family makes of a file without a list.
    """
    found = theirs.get("layer_types")
    kinds = list(usual) if found is None else list(found)
    if len(kinds) != theirs["num_hidden_layers"] or set(kinds) - {FULL, SLIDING}:
        what = f"only one of {FULL} and {SLIDING} for each of {theirs['num_hidden_layers']} layers can be taken over"
        raise ConfigError.of(what, key="layer_types", value=found, location="config.json")
    if SLIDING in kinds and (not isinstance(theirs.get("sliding_window"), int) or theirs["sliding_window"] < 1):
        what = "layer_types has blocks with a window, which must be at least 1"
        raise ConfigError.of(what, key="sliding_window", value=theirs.get("sliding_window"), location="config.json")
    return kinds


def periodic_kinds(layers: int, period: int) -> list[str]:
    """Returns windows in all blocks but every `period`-th."""
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


def kinds_of(model: ModelSection) -> list[str]:
    """Returns the kind of each of our blocks: with a window, or without."""
    return [FULL if block.sliding_window_width is None else SLIDING for block in model.block_options]


def window_of(model: ModelSection) -> int | None:
    """Returns the first window of our blocks [tokens]; None where none has one."""
    return next((block.sliding_window_width for block in model.block_options if block.sliding_window_width), None)


def window_misfits(model: ModelSection, family: str, *, one_rope: bool = True) -> list[ConfigIssue]:
    """What of types of blocks a family cannot say: several windows, and unless allowed several rotary positions.

    Args:
        model: The model section.
        family: Its name, for messages.
        one_rope: Whether all its blocks have the same rotary positions.
    """
    if not model.layer_types:
        return []
    blocks, options = model.block_options, model.layer_type_options
    errors = []
    if len({block.sliding_window_width for block in blocks} - {None}) > 1:
        what = f"a {family} model has one window"
        errors.append(ConfigIssue(what, key="layer_type_options", value=options))
    own = (model.rotary_emb_base, model.rope_scaling, True)
    if one_rope and any((block.rotary_emb_base, block.rope_scaling, block.rotary) != own for block in blocks):
        what = f"all blocks of a {family} model have the same rotary positions"
        errors.append(ConfigIssue(what, key="layer_type_options", value=options))
    return errors
