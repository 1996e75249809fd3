"""Checks the blocks `lora` and `soft_prompt_tuning` and fills in their defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from megatron.adapter_config import (
    ALIASES,
    ALL,
    CHANNEL_MIXING,
    EXPERTS_IN,
    EXPERTS_OUT,
    GATE,
    GMLP,
    IN_PROJ,
    OUT_PROJ,
    SAVED,
    SHARED_IN,
    SHARED_OUT,
    SHORT,
    TARGETS,
    TIME_MIXING,
    enabled,
    low_rank,
    modules_to_save,
    soft_prompt,
    takes_all,
    targets,
)
from megatron.errors import ConfigError
from megatron.registry import (
    FROZEN_FORMATS,
    GATED_MLPS,
    REPLACING,
    WITH_IN_PROJ,
    WITH_OUT_PROJ,
    WITHOUT_ATTENTION,
    WITHOUT_MLP,
    nearest_name,
)

Block = Mapping[str, Any]
SWITCHES = ("rslora", "dora")
NAMES = ("enabled", "rank", "alpha", "dropout", "targets", "modules_to_save", "base", *SWITCHES)
"""What a `lora` block may have."""
OF_MIXERS: Mapping[str, frozenset[str]] = {
    IN_PROJ: WITH_IN_PROJ,
    OUT_PROJ: WITH_OUT_PROJ,
    TIME_MIXING: frozenset({"rwkv"}),
    CHANNEL_MIXING: frozenset({"rwkv"}),
    GMLP: GATED_MLPS,
}
"""Target of a mixer -> the kinds of blocks that have it."""


def derive_lora(
    block: Block | None, *, gated: bool = False, kinds: Collection[str] = (), dense: bool = True
) -> dict[str, Any] | None:
    """Returns the block with its defaults; None where it is disabled. Raises ConfigError where it is invalid.

    Args:
        block: as given.
        gated: whether the model has output gates of attention, which `all` targets too then.
        kinds: of the blocks; `all` targets the matrices that they have.
        dense: whether some block has an MLP and no experts, whose matrices `all` beside `experts` targets too.
    """
    error = _lora_error(block)
    if error is not None:
        further = "modules_to_save: [embedding, head]" if "modules_to_save" in error else "targets: all"
        raise ConfigError.of(error, key="lora", value=block, hint=_hint(error, f"write {{rank: 8, {further}}}"))
    requested = low_rank(block)
    if requested is None or block is None:
        return None
    if not takes_all(block):
        return requested.block()
    found, asked = set(kinds), requested.targets
    attends = not found or found - WITHOUT_ATTENTION
    fed = (not found or found - WITHOUT_MLP) and (dense or not requested.of_experts)
    has = {
        "query_key_value": attends,
        GATE: gated,
        "dense": attends or found & REPLACING,
        "dense_h_to_4h": fed,
        "dense_4h_to_h": fed,
        EXPERTS_IN: EXPERTS_IN in asked,
        EXPERTS_OUT: EXPERTS_OUT in asked,
        SHARED_IN: SHARED_IN in asked,
        SHARED_OUT: SHARED_OUT in asked,
        **{name: found & kinds for name, kinds in OF_MIXERS.items()},
    }
    named = tuple(name for name in TARGETS if has[name])
    return replace(requested, targets=named or requested.targets).block()


def derive_soft_prompt(block: Block | None) -> dict[str, Any] | None:
    """Returns the block with its defaults; None where it is disabled. Raises ConfigError where it is invalid."""
    error = _soft_prompt_error(block)
    if error is not None:
        hint = _hint(error, "write {num_tokens: 20}")
        raise ConfigError.of(error, key="soft_prompt_tuning", value=block, hint=hint)
    requested = soft_prompt(block)
    return None if requested is None else requested.block()


def _hint(error: str, example: str) -> str | None:
    """Returns a hint with an example; None where the error itself ends in a hint."""
    return None if error.endswith("?") else f"{example}, or the like"


def _lora_error(block: Block | None) -> str | None:
    issue = _unknown_name_error(block, NAMES)
    if issue is not None or block is None or not enabled(block):
        return issue
    if not _is_positive_int(block.get("rank")):
        return f"rank is a whole number from 1 on, not {block.get('rank')!r}"
    alpha, dropout = block.get("alpha"), block.get("dropout")
    if alpha is not None and (not _is_number(alpha) or alpha <= 0):
        return f"alpha is a number above 0, not {alpha!r}"
    if dropout is not None and (not _is_number(dropout) or not 0 <= dropout < 1):
        return f"dropout is a probability below 1, not {dropout!r}"
    for name in SWITCHES:
        if not isinstance(block.get(name, False), bool):
            return f"{name} is true or false, not {block[name]!r}"
    return _base_error(block.get("base")) or _targets_error(block) or _modules_error(block)


def _base_error(name: Any) -> str | None:
    if name is None or (isinstance(name, str) and name in FROZEN_FORMATS):
        return None
    close = FROZEN_FORMATS.nearest(str(name))
    choices = f"base is one of {', '.join(FROZEN_FORMATS.names)}"
    return f"there is no base {name}; " + (f"did you mean {close}?" if close else choices)


def _targets_error(block: Block) -> str | None:
    given = block.get("targets", ALL)
    if given is None:
        return None
    if not isinstance(given, (str, list, tuple)) or not given:
        return f"targets is a list of matrices, or {ALL}, not {given!r}"
    if not all(isinstance(name, str) for name in given):
        return f"targets is a list of names, not {list(given)!r}"
    unknown = [name for name in targets(block) if name not in TARGETS]
    if not unknown:
        return None
    joint = unknown[0].endswith("_proj")  # one of the matrices that transformers keeps apart
    close = None if joint else nearest_name(unknown[0], [*TARGETS, *ALIASES, *SHORT, ALL])
    named = ", ".join((*TARGETS, *SHORT))
    choices = f"{named} (queries, keys and values are one matrix) and {ALL}"
    return f"there is no matrix {unknown[0]}; " + (f"did you mean {close}?" if close else f"the targets are {choices}")


def _modules_error(block: Block) -> str | None:
    given = block.get("modules_to_save")
    if given is None:
        return None
    if not isinstance(given, (str, list, tuple)) or not all(isinstance(name, str) for name in given):
        return f"modules_to_save is a list of {' and '.join(SAVED)}, not {given!r}"
    unknown = [name for name in modules_to_save(block) if name not in SAVED]
    if not unknown:
        return None
    close = nearest_name(unknown[0], SAVED)
    choices = f"modules_to_save takes {SAVED[0]} (tokens to vectors) and {SAVED[1]} (the output layer) of any model"
    return f"there is no module {unknown[0]}; " + (f"did you mean {close}?" if close else choices)


def _soft_prompt_error(block: Block | None) -> str | None:
    issue = _unknown_name_error(block, ("enabled", "num_tokens", "init_string", "init_range"))
    if issue is not None or block is None or not enabled(block):
        return issue
    if block.get("num_tokens") is not None and not _is_positive_int(block["num_tokens"]):
        return f"num_tokens is a whole number from 1 on, not {block['num_tokens']!r}"
    if not isinstance(block.get("init_string") or "", str):
        return f"init_string is text, not {block['init_string']!r}"
    span = block.get("init_range")
    if span is not None and (not _is_number(span) or span <= 0):
        return f"init_range is a number above 0, not {span!r}"
    return None


def _unknown_name_error(block: Block | None, known: tuple[str, ...]) -> str | None:
    """Returns the error of an unknown name, or of an `enabled` that is not boolean."""
    for name in block or {}:
        if name not in known:
            close = nearest_name(str(name), known)
            return f"it has no {name}; " + (f"did you mean {close}?" if close else f"it has {', '.join(known)}")
    switch = (block or {}).get("enabled", True)
    return None if isinstance(switch, bool) else f"enabled is true or false, not {switch!r}"


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
