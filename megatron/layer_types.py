"""What blocks of one model have of their own: window, rotary base and scaling, or no rotary positions.

`layer_types` names the type of each block and `layer_type_options` what a type has in place of the model's values, so
that any pattern of any period is a list. Read here as plain values, for the model, the plan and the choice of kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROTARY = "rotary"
"""The option that switches rotary positions off."""


@dataclass(frozen=True)
class LayerOptions:
    """What a block has, of what types may change."""

    sliding_window_width: int | None = None
    """Positions that each token attends to, itself included; None for all [tokens]."""
    rotary_emb_base: int = 10000
    """Base of the rotary wavelengths."""
    rope_scaling: Mapping[str, Any] | None = None
    """Scaling of rotary positions."""
    rotary: bool = True
    """Whether the block has rotary positions, in a model that has them."""


OPTIONS = tuple(LayerOptions.__dataclass_fields__)
"""Names that a type may have."""


def options_of_blocks(model: Any) -> tuple[LayerOptions, ...]:
    """Returns what each block has. model: an object with the keys of the model section, derived values included."""
    own = LayerOptions(model.sliding_window_width, model.rotary_emb_base, model.rope_scaling)
    if not model.layer_types:
        return (own,) * model.num_layers
    types = {name: _changed(own, changes) for name, changes in (model.layer_type_options or {}).items()}
    return tuple(types.get(name, own) for name in model.layer_types)


def _changed(own: LayerOptions, changes: Mapping[str, Any] | None) -> LayerOptions:
    return LayerOptions(**{**vars(own), **(changes or {})})
