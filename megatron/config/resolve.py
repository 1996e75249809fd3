"""merge -> decode -> derive -> rules -> Config. The only constructor of a run's configuration.

Nothing here imports torch, so a launcher can resolve a configuration in a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.config.complete import Completion, complete
from megatron.config.config import CATALOG, Config, unknown_key
from megatron.config.decode import decode
from megatron.config.legacy import modernise
from megatron.config.merge import Given, merge
from megatron.config.resources import Resources
from megatron.config.rules.every import violations
from megatron.config.sections.launch import LaunchSection
from megatron.config.support import not_supported_yet, without_effect
from megatron.config.words import accepts
from megatron.errors import UNSET, ConfigError, Mistake

DEFAULT, DERIVED = "default", "derived"

RULES_NEED = {"num_layers", "hidden_size", "num_attention_heads", "seq_length", "attention_config"}
"""Keys without which no rule can be asked."""


@dataclass(frozen=True)
class Resolution:
    """A resolved configuration and how it came about.

    origin: for every key `file:line`, "command line", "default" or "derived". warnings: one line each, about values
    without effect. not_supported_yet: one line for each value whose feature is not built; launching refuses these.
    """

    config: Config
    origin: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    not_supported_yet: list[str] = field(default_factory=list)


def resolve(
    files: Sequence[str | os.PathLike[str]],
    flags: Mapping[str, Any] | None = None,
    resources: Resources | Callable[[LaunchSection], Resources] = Resources(1),  # noqa: B008 (it is frozen)
) -> Resolution:
    """Reads files and flags and returns the one configuration that they mean.

    files: YAML or JSON, in any order. flags: key -> value; they win over files. resources: what the machine offers,
    or a function that finds it out from the launch section (hostfile, num_gpus, ...). Raises ConfigError with every
    mistake that can be told at once.
    """
    merged = merge(files, flags)
    given, mistakes, warnings = modernise(merged.values)
    mistakes = [*merged.mistakes, *mistakes]
    mistakes += [unknown_key(name, where=one.where) for name, one in given.items() if name not in CATALOG]
    tuned = _left_to_autotuner(given)
    values, unchosen = decode({name: one.value for name, one in given.items() if name not in tuned})
    mistakes += _placed(unchosen, given)
    refused = {mistake.key for mistake in unchosen}
    try:
        typed = Config.from_flat({name: value for name, value in values.items() if name not in refused})
    except ConfigError as fault:
        mistakes += _placed(fault.mistakes, given)
    ConfigError.raise_any(mistakes)
    found = resources(typed.launch) if callable(resources) else resources
    return _finish(typed, given, merged.texts, found, warnings)


def _left_to_autotuner(given: Mapping[str, Given]) -> set[str]:
    """Keys that take no text and say `auto`, where the autotuner is asked for; they count as not given."""
    if "autotuning" not in given or not given["autotuning"].value:
        return set()
    auto = {name for name, one in given.items() if one.value == "auto" and name in CATALOG}
    return {name for name in auto if not accepts(CATALOG[name].annotation, str)}


def _finish(
    typed: Config, given: Mapping[str, Given], texts: dict[str, str], resources: Resources, warnings: list[str]
) -> Resolution:
    """Derives what follows, applies the rules and gathers what is worth telling."""
    before = {**typed.flat(), "config_files": texts or typed.checkpoint.config_files}
    draft = complete(before, given.keys(), resources)
    ConfigError.raise_any(_placed([*draft.mistakes, *_further(draft)], given))
    config = Config.from_flat(draft.values)
    derived = draft.derived | {"config_files"}
    origin = {name: DERIVED if name in derived else given[name].where if name in given else DEFAULT for name in CATALOG}
    warnings = [*warnings, *_with_where(draft.warnings, given), *_with_where(without_effect(config), given)]
    if config.launch.strict_config and warnings:
        raise ConfigError(*(Mistake(line, remedy="strict_config makes this an error") for line in warnings))
    return Resolution(config, origin, warnings, not_supported_yet(config))


def _further(draft: Completion) -> list[Mistake]:
    """What the rules find. With mistakes before, only where the model's sizes are known, and not of the same keys."""
    told = {mistake.key for mistake in draft.mistakes}
    if told & RULES_NEED:
        return []
    return [mistake for mistake in violations(Config.from_flat(draft.values)) if mistake.key not in told]


def _placed(mistakes: Sequence[Mistake], given: Mapping[str, Given]) -> list[Mistake]:
    """The mistakes with the place where the key was given."""
    placed = []
    for mistake in mistakes:
        source = given.get(mistake.key or "")
        if source is not None and mistake.where is None:
            value = source.value if mistake.value is UNSET else mistake.value
            mistake = replace(mistake, where=source.where, value=value)
        placed.append(mistake)
    return placed


def _with_where(lines: Sequence[str], given: Mapping[str, Given]) -> list[str]:
    """Each line, after the place where its key was given."""
    told = []
    for line in lines:
        source = given.get(line.partition(" ")[0].rstrip(":"))
        told.append(f"{source.where}: {line}" if source else line)
    return told
