"""Rules for position schemes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.config import Config
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue
from megatron.registry import POSITIONS, nearest_name

TRUNCATE = "truncate"
SCALINGS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor", "original_max_position_embeddings"}), frozenset()),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", TRUNCATE}),
    ),
    "llama3": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"low_freq_factor", "high_freq_factor"}),
    ),
}
"""Type of rope_scaling -> required names, optional names."""


def sines_come_in_pairs(config: Config) -> Iterator[ConfigIssue]:
    """Half of the features are sines and half cosines."""
    model = config.model
    if model.pos_emb == "sinusoidal" and (model.hidden_size or 0) % 2:
        yield ConfigIssue("pos_emb = sinusoidal needs an even width", key="hidden_size", value=model.hidden_size)


def buckets_hold_distances(config: Config) -> Iterator[ConfigIssue]:
    """Half of the buckets have one distance each; the rest cover the distances to rpe_max_distance."""
    model = config.model
    if "rpe_num_buckets" not in POSITIONS.entry(model.pos_emb).settings:
        return
    if model.rpe_num_buckets < 2:
        yield ConfigIssue("it must be at least 2", key="rpe_num_buckets", value=model.rpe_num_buckets)
    elif model.rpe_max_distance <= model.rpe_num_buckets // 2:
        yield ConfigIssue(
            f"the first {model.rpe_num_buckets // 2} of rpe_num_buckets = {model.rpe_num_buckets} reach further",
            key="rpe_max_distance",
            value=model.rpe_max_distance,
        )


def scaling_is_known(config: Config) -> Iterator[ConfigIssue]:
    """rope_scaling has a type and its numbers; only rotary positions are scaled."""
    model = config.model
    scaling: Mapping[str, Any] | None = model.rope_scaling
    if not scaling:
        return
    message = scaling_error(scaling)
    if "rope_scaling" not in POSITIONS.entry(model.pos_emb).settings:
        message = f"pos_emb = {model.pos_emb} has no rotary positions to scale"
    elif message is None and scaling["type"] == "dynamic" and rotary_width(model) <= 2:
        message = "the dynamic type needs at least two turned pairs of features"
    if message is not None:
        yield ConfigIssue(message, key="rope_scaling", value=dict(scaling))


def rotary_width(model: ModelSection) -> int:
    """Returns the features of a head that rotary positions rotate."""
    if model.multi_latent_attention:
        return model.qk_pos_emb_head_dim
    return int((model.kv_channels or 0) * model.rotary_pct)


def scaling_error(scaling: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a scaling, or None."""
    kind = scaling.get("type")
    if kind not in SCALINGS:
        return f"type must be one of {', '.join(SCALINGS)}, not {kind!r}"
    needed, further = SCALINGS[kind]
    for name in scaling:
        if name not in needed | further | {"type"}:
            close = nearest_name(str(name), needed | further)
            return f"{kind} has no {name}" + (f"; did you mean {close}?" if close else "")
    missing = sorted(needed - scaling.keys())
    if missing:
        return f"{kind} needs {', '.join(missing)}"
    for name in (needed | further) & scaling.keys():
        value = scaling[name]
        if name == TRUNCATE:
            if not isinstance(value, bool):
                return f"{name} must be true or false, not {value!r}"
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            return f"{name} must be a number above 0, not {value!r}"
    if scaling["factor"] < 1:
        return f"factor = {scaling['factor']} would shorten the context; it is at least 1"
    if kind == "llama3" and scaling.get("low_freq_factor", 1.0) >= scaling.get("high_freq_factor", 4.0):
        return "low_freq_factor must be below high_freq_factor"
    return None
