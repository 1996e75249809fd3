"""What muP makes of the weights of a checkpoint: kept beside them, and compared by whoever loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.schema.mup import MupSection
from megatron.errors import ConfigError, ConfigIssue

_KEYS = ("mup_base_widths", "mup_attn_temp", "mup_output_temp", "mup_embedding_mult", "mup_rp_embedding_mult")


def parametrisation_facts(mup: MupSection) -> dict[str, Any]:
    """The keys that decide which model the weights are, with their values; {} where muP is off.

    On mup_init_scale and the learning rates nothing depends once the weights are there.
    """
    return {"use_mup": True, **{key: getattr(mup, key) for key in _KEYS}} if mup.use_mup else {}


def same_parametrisation(stored: Mapping[str, Any], mup: MupSection, location: Path) -> None:
    """ConfigError for each key that would make another model of the stored weights.

    stored: what `parametrisation_facts` gave when they were saved.
    """
    own, default = parametrisation_facts(mup), {"use_mup": False}
    stored, own = (dict(facts) or default for facts in (stored, own))
    differing = ["use_mup"] if stored["use_mup"] != own["use_mup"] else [key for key in own if stored[key] != own[key]]
    ConfigError.raise_any(
        ConfigIssue(
            f"the checkpoint {location} was trained with {stored[key]!r}, and with another value its weights are "
            "another model",
            key=key,
            value=own[key],
            hint="give base_shapes_file and the mup_ keys of that run",
        )
        for key in differing
    )
