"""The blocks `lora` and `soft_prompt_tuning`: what is wrong with them, and what they mean with nothing left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.adapter_config import ALIASES, ALL, TARGETS, enabled, low_rank, soft_prompt, targets
from megatron.errors import ConfigError
from megatron.registry import nearest_name

Block = Mapping[str, Any]


def derive_lora(block: Block | None) -> dict[str, Any] | None:
    """The block with its defaults, None where it is switched off. ConfigError where it makes no sense."""
    error = _lora_error(block)
    if error is not None:
        raise ConfigError.of(error, key="lora", value=block, hint=_hint(error, "write {rank: 8, targets: all}"))
    asked = low_rank(block)
    return None if asked is None else asked.block()


def derive_soft_prompt(block: Block | None) -> dict[str, Any] | None:
    """The block with its defaults, None where it is switched off. ConfigError where it makes no sense."""
    error = _soft_prompt_error(block)
    if error is not None:
        hint = _hint(error, "write {num_tokens: 20}")
        raise ConfigError.of(error, key="soft_prompt_tuning", value=block, hint=hint)
    asked = soft_prompt(block)
    return None if asked is None else asked.block()


def _hint(error: str, example: str) -> str | None:
    """What to do about it, where the error does not end in that already."""
    return None if error.endswith("?") else f"{example}, or the like"


def _lora_error(block: Block | None) -> str | None:
    told = _strange(block, ("enabled", "rank", "alpha", "dropout", "targets"))
    if told is not None or block is None or not enabled(block):
        return told
    if not _whole(block.get("rank")):
        return f"rank is a whole number from 1 on, not {block.get('rank')!r}"
    alpha, dropout = block.get("alpha"), block.get("dropout")
    if alpha is not None and (not _number(alpha) or alpha <= 0):
        return f"alpha is a number above 0, not {alpha!r}"
    if dropout is not None and (not _number(dropout) or not 0 <= dropout < 1):
        return f"dropout is a probability below 1, not {dropout!r}"
    return _targets_error(block)


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
    close = nearest_name(unknown[0], [*TARGETS, *ALIASES, ALL])
    choices = f"{', '.join(TARGETS)} (queries, keys and values are one matrix) and {ALL}"
    return f"there is no matrix {unknown[0]}; " + (f"did you mean {close}?" if close else f"the targets are {choices}")


def _soft_prompt_error(block: Block | None) -> str | None:
    told = _strange(block, ("enabled", "num_tokens", "init_string", "init_range"))
    if told is not None or block is None or not enabled(block):
        return told
    if block.get("num_tokens") is not None and not _whole(block["num_tokens"]):
        return f"num_tokens is a whole number from 1 on, not {block['num_tokens']!r}"
    if not isinstance(block.get("init_string") or "", str):
        return f"init_string is text, not {block['init_string']!r}"
    span = block.get("init_range")
    if span is not None and (not _number(span) or span <= 0):
        return f"init_range is a number above 0, not {span!r}"
    return None


def _strange(block: Block | None, known: tuple[str, ...]) -> str | None:
    """Names that the block does not have, and a switch that is none."""
    for name in block or {}:
        if name not in known:
            close = nearest_name(str(name), known)
            return f"it has no {name}; " + (f"did you mean {close}?" if close else f"it has {', '.join(known)}")
    switch = (block or {}).get("enabled", True)
    return None if isinstance(switch, bool) else f"enabled is true or false, not {switch!r}"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
