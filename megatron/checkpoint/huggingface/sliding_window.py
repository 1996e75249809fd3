"""The window of attention that config.json gives each block, as the one that all of ours have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.checkpoint.huggingface.family import Settings
from megatron.errors import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"


def one_window(theirs: Mapping[str, Any], window: int | None, kinds: Sequence[str]) -> Settings:
    """sliding_window_width, or nothing where every block sees all earlier positions.

    theirs: completed. window: what the blocks of kind `sliding_attention` see [tokens]; None where there is none.
    kinds: what the family makes of the blocks, one each. A window as long as the longest sequence is none. Raises
    ConfigError where the file's own `layer_types` says otherwise, or the blocks differ.
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
        raise ConfigError.of(
            "some blocks have a window and others none (layer_types or max_window_layers says so); only one window for "
            "all can be taken over",
            key="layer_types",
            value=list(kinds),
            location="config.json",
        )
    return {"sliding_window_width": window}
