"""merge -> decode -> derive -> rules -> Config. The only constructor of a run's configuration.

Nothing here imports torch, so a launcher can resolve a configuration in a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.config.cluster import Resources
from megatron.config.coerce import decode
from megatron.config.config import FIELDS, Config, unknown_key
from megatron.config.defaults.fill_defaults import complete
from megatron.config.renamed_keys import RENAMED, apply_renames
from megatron.config.schema.launch import LaunchSection
from megatron.config.type_names import accepts
from megatron.config.validation.unknown_values import meant
from megatron.config.validation.unsupported import not_supported_yet, without_effect
from megatron.config.validation.validate import violations
from megatron.config.yaml_loader import COMMAND_LINE, SourcedValue, find_file, merge, normal_name
from megatron.errors import UNSET, ConfigError, ConfigIssue

DEFAULT, DERIVED = "default", "derived"

CHOOSE_MACHINES = frozenset(("hostfile", "include", "exclude", "num_nodes", "num_gpus", "global_num_gpus"))
"""Keys without which nobody can say where the ranks run."""


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
    issues: Sequence[ConfigIssue] = (),
) -> Resolution:
    """Reads files and flags and returns the one configuration that they mean.

    files: YAML or JSON, in any order. flags: key -> value; they win over files. resources: what the machine offers,
    or a function that finds it out from the launch section (hostfile, num_gpus, ...). errors: what was already
    found wrong, with the command line. Raises ConfigError with every error that can be told: those of spelling and
    type, and what arithmetic and rules say of the values that are good.
    """
    read = _read(files, flags, issues)
    found = _machines(resources, read)
    draft = complete({**read.typed.flat(), "config_files": read.texts}, read.given.keys(), found, read.unknown)
    read.issues += draft.issues
    try:
        config = Config.from_flat(draft.values)
    except ConfigError as error:
        raise ConfigError(*_in_order([*read.issues, *error.issues], files, read.given)) from error
    read.issues += violations(config, draft.unknown)
    lines = [*draft.warnings, *without_effect(config, read.given.keys())]
    warnings = [*read.warnings, *_with_where(lines, read.given)]
    if config.launch.strict_config and draft.knows("strict_config"):
        read.issues += [ConfigIssue(line, hint="strict_config makes this an error") for line in warnings]
    ConfigError.raise_any(_in_order(read.issues, files, read.given))
    derived = draft.derived | {"config_files"}
    origin = {
        name: DERIVED if name in derived else read.given[name].location if name in read.given else DEFAULT
        for name in FIELDS
    }
    return Resolution(config, origin, warnings, not_supported_yet(config))


@dataclass
class _Read:
    """What the sources say. typed: the good values. unknown: keys of which it is not known what the user wants."""

    typed: Config
    given: Mapping[str, SourcedValue]
    texts: dict[str, str] | None
    issues: list[ConfigIssue]
    warnings: list[str]
    unknown: set[str]


def _read(
    files: Sequence[str | os.PathLike[str]], flags: Mapping[str, Any] | None, before: Sequence[ConfigIssue]
) -> _Read:
    merged = merge(files, flags)
    given, outdated, warnings = apply_renames(merged.values)
    strange = {name: one for name, one in given.items() if name not in FIELDS}
    spelling = [unknown_key(name, value=one.value, location=one.location) for name, one in strange.items()]
    values, unchosen = decode({name: one.value for name, one in _without_auto(given).items()})
    refused = {issue.key for issue in unchosen}
    good = {name: value for name, value in values.items() if name not in refused}
    typed, mistyped = _typed(good)
    wrong = [*unchosen, *mistyped]
    unknown = {issue.key for issue in (*wrong, *merged.doubtful) if issue.key in FIELDS}
    unknown |= meant([*before, *outdated, *spelling], FIELDS.keys() - given.keys())
    nested = {str(name) for one in strange.values() if isinstance(one.value, Mapping) for name in one.value}
    unknown |= {normal_name(name) for name in nested} & (FIELDS.keys() - given.keys())
    unknown |= {RENAMED[issue.key] for issue in outdated if issue.key in RENAMED}
    if merged.unreadable:
        unknown |= FIELDS.keys() - given.keys()
    texts = merged.texts or typed.checkpoint.config_files
    issues = [*before, *merged.issues, *outdated, *spelling, *wrong]
    return _Read(typed, given, texts, issues, warnings, {name for name in unknown if name})


def _typed(values: Mapping[str, Any]) -> tuple[Config, list[ConfigIssue]]:
    """The configuration of those values that have their key's type, and the errors of the others."""
    try:
        return Config.from_flat(values), []
    except ConfigError as error:
        wrong = {issue.key for issue in error.issues}
        good = {name: value for name, value in values.items() if name not in wrong}
        return Config.from_flat(good), list(error.issues)


def _machines(resources: Resources | Callable[[LaunchSection], Resources], read: _Read) -> Resources | None:
    """What the machines offer; None where the keys that choose them are wrong."""
    if not callable(resources):
        return resources
    if not read.unknown.isdisjoint(CHOOSE_MACHINES):
        return None
    try:
        return resources(read.typed.launch)
    except ConfigError as error:
        read.issues += error.issues
        return None


def _without_auto(given: Mapping[str, SourcedValue]) -> dict[str, SourcedValue]:
    """Leaves out the keys that the autotuner is to find."""
    tuned = _left_to_autotuner(given)
    return {name: one for name, one in given.items() if name not in tuned}


def _left_to_autotuner(given: Mapping[str, SourcedValue]) -> set[str]:
    """Keys that take no text and say `auto`, where the autotuner is asked for; they count as not given."""
    if "autotuning" not in given or not given["autotuning"].value:
        return set()
    auto = {name for name, one in given.items() if one.value == "auto" and name in FIELDS}
    return {name for name in auto if not accepts(FIELDS[name].annotation, str)}


def _in_order(
    issues: Sequence[ConfigIssue], files: Sequence[str | os.PathLike[str]], given: Mapping[str, SourcedValue]
) -> list[ConfigIssue]:
    """The errors with the places where their keys were given, from the first file's first line to no place."""
    names = {str(find_file(name) or name): number for number, name in enumerate(files)}

    def place(issue: ConfigIssue) -> tuple[int, int]:
        location = issue.location or ""
        name, _, line = location.rpartition(":")
        if name in names and line.isdecimal():
            return names[name], int(line)
        return names.get(location, len(names) + (location != COMMAND_LINE)), 0

    once = {str(issue): issue for issue in _placed(issues, given)}
    return sorted(once.values(), key=place)


def _placed(issues: Sequence[ConfigIssue], given: Mapping[str, SourcedValue]) -> list[ConfigIssue]:
    """The errors with the place where the key was given."""
    placed = []
    for issue in issues:
        source = given.get(issue.key or "")
        if source is not None and issue.location is None:
            value = source.value if issue.value is UNSET else issue.value
            issue = replace(issue, location=source.location, value=value)
        placed.append(issue)
    return placed


def _with_where(lines: Sequence[str], given: Mapping[str, SourcedValue]) -> list[str]:
    """Each line, after the place where its key was given."""
    told = []
    for line in lines:
        source = given.get(line.partition(" ")[0].rstrip(":"))
        told.append(f"{source.location}: {line}" if source else line)
    return told
