"""Resolves files and flags to a Config: merge, coerce, fill defaults, validate.

Nothing here imports torch, so a launcher can resolve a configuration in a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.config.cluster import Resources
from megatron.config.coerce import coerce
from megatron.config.config import FIELDS, Config, unknown_key
from megatron.config.derived.fill import fill_defaults
from megatron.config.renamed_keys import RENAMED, apply_renames
from megatron.config.schema.launch import LaunchSection
from megatron.config.type_names import allows_type
from megatron.config.validation.unknown_values import keys_in_hints
from megatron.config.validation.unsupported import keys_without_effect, not_supported_yet
from megatron.config.validation.validate import find_violations
from megatron.config.yaml_loader import COMMAND_LINE, SourcedValue, find_file, merge, normalize_key
from megatron.errors import UNSET, ConfigError, ConfigIssue

DEFAULT, DERIVED = "default", "derived"

HOST_SELECTION_KEYS = frozenset(("hostfile", "include", "exclude", "num_nodes", "num_gpus", "global_num_gpus"))
"""Keys that select hosts and ranks."""


@dataclass(frozen=True)
class Resolution:
    """A resolved configuration with the origin of its values."""

    config: Config
    """The configuration."""
    origin: dict[str, str]
    """Key -> `file:line`, "command line", "default" or "derived"."""
    warnings: list[str] = field(default_factory=list)
    """Values without effect, one line each."""
    not_supported_yet: list[str] = field(default_factory=list)
    """Values whose feature is not built, one line each; launching rejects them."""


def resolve(
    files: Sequence[str | os.PathLike[str]],
    flags: Mapping[str, Any] | None = None,
    resources: Resources | Callable[[LaunchSection], Resources] = Resources(1),  # noqa: B008 (it is frozen)
    issues: Sequence[ConfigIssue] = (),
) -> Resolution:
    """Reads files and flags and returns the resolved configuration.

    Raises ConfigError with all errors: spelling, types, derivations and rules.

    Args:
        files: YAML or JSON, in any order.
        flags: key -> value; they override files.
        resources: of the cluster, or a function that finds them from the launch section (hostfile, num_gpus, ...).
        issues: errors that were already found in the command line.
    """
    read = _read_sources(files, flags, issues)
    found = _find_resources(resources, read)
    draft = fill_defaults({**read.typed.flat(), "config_files": read.texts}, read.given.keys(), found, read.unknown)
    read.issues += draft.issues
    try:
        config = Config.from_flat(draft.values)
    except ConfigError as error:
        raise ConfigError(*_sort_issues([*read.issues, *error.issues], files, read.given)) from error
    read.issues += find_violations(config, draft.unknown)
    lines = [*draft.warnings, *keys_without_effect(config, read.given.keys())]
    warnings = [*read.warnings, *_prefix_locations(lines, read.given)]
    if config.launch.strict_config and draft.knows("strict_config"):
        read.issues += [ConfigIssue(line, hint="strict_config makes this an error") for line in warnings]
    ConfigError.raise_any(_sort_issues(read.issues, files, read.given))
    derived = draft.derived | {"config_files"}
    origin = {
        name: DERIVED if name in derived else read.given[name].location if name in read.given else DEFAULT
        for name in FIELDS
    }
    return Resolution(config, origin, warnings, not_supported_yet(config))


@dataclass
class _ParsedSources:
    """Values of files and flags after type checks."""

    typed: Config
    """The valid values."""
    given: Mapping[str, SourcedValue]
    """The values as given, under today's keys."""
    texts: dict[str, str] | None
    """File name -> text."""
    issues: list[ConfigIssue]
    """Errors found so far."""
    warnings: list[str]
    """Warnings found so far."""
    unknown: set[str]
    """Keys whose value is invalid or could not be read."""


def _read_sources(
    files: Sequence[str | os.PathLike[str]], flags: Mapping[str, Any] | None, before: Sequence[ConfigIssue]
) -> _ParsedSources:
    merged = merge(files, flags)
    given, outdated, warnings = apply_renames(merged.values)
    strange = {name: one for name, one in given.items() if name not in FIELDS}
    spelling = [unknown_key(name, value=one.value, location=one.location) for name, one in strange.items()]
    values, unchosen = coerce({name: one.value for name, one in _drop_auto(given).items()})
    refused = {issue.key for issue in unchosen}
    good = {name: value for name, value in values.items() if name not in refused}
    typed, mistyped = _valid_values(good)
    wrong = [*unchosen, *mistyped]
    unknown = {issue.key for issue in (*wrong, *merged.conflicting) if issue.key in FIELDS}
    unknown |= keys_in_hints([*before, *outdated, *spelling], FIELDS.keys() - given.keys())
    nested = {str(name) for one in strange.values() if isinstance(one.value, Mapping) for name in one.value}
    unknown |= {normalize_key(name) for name in nested} & (FIELDS.keys() - given.keys())
    unknown |= {RENAMED[issue.key] for issue in outdated if issue.key in RENAMED}
    if merged.unreadable:
        unknown |= FIELDS.keys() - given.keys()
    texts = merged.texts or typed.checkpoint.config_files
    issues = [*before, *merged.issues, *outdated, *spelling, *wrong]
    return _ParsedSources(typed, given, texts, issues, warnings, {name for name in unknown if name})


def _valid_values(values: Mapping[str, Any]) -> tuple[Config, list[ConfigIssue]]:
    """Returns the configuration of the values that have their key's type, and the issues of the others."""
    try:
        return Config.from_flat(values), []
    except ConfigError as error:
        wrong = {issue.key for issue in error.issues}
        good = {name: value for name, value in values.items() if name not in wrong}
        return Config.from_flat(good), list(error.issues)


def _find_resources(
    resources: Resources | Callable[[LaunchSection], Resources], read: _ParsedSources
) -> Resources | None:
    """Returns the resources; None where the keys that select them are invalid."""
    if not callable(resources):
        return resources
    if not read.unknown.isdisjoint(HOST_SELECTION_KEYS):
        return None
    try:
        return resources(read.typed.launch)
    except ConfigError as error:
        read.issues += error.issues
        return None


def _drop_auto(given: Mapping[str, SourcedValue]) -> dict[str, SourcedValue]:
    """Leaves out the keys that the autotuner sets."""
    tuned = _autotuned_keys(given)
    return {name: one for name, one in given.items() if name not in tuned}


def _autotuned_keys(given: Mapping[str, SourcedValue]) -> set[str]:
    """Returns the keys with the value `auto` that take no text, if the autotuner is on."""
    if "autotuning" not in given or not given["autotuning"].value:
        return set()
    auto = {name for name, one in given.items() if one.value == "auto" and name in FIELDS}
    return {name for name in auto if not allows_type(FIELDS[name].annotation, str)}


def _sort_issues(
    issues: Sequence[ConfigIssue], files: Sequence[str | os.PathLike[str]], given: Mapping[str, SourcedValue]
) -> list[ConfigIssue]:
    """Returns the issues with locations, sorted by file and line; issues without location are last."""
    names = {str(find_file(name) or name): number for number, name in enumerate(files)}

    def sort_key(issue: ConfigIssue) -> tuple[int, int]:
        location = issue.location or ""
        name, _, line = location.rpartition(":")
        if name in names and line.isdecimal():
            return names[name], int(line)
        return names.get(location, len(names) + (location != COMMAND_LINE)), 0

    once = {str(issue): issue for issue in _add_locations(issues, given)}
    return sorted(once.values(), key=sort_key)


def _add_locations(issues: Sequence[ConfigIssue], given: Mapping[str, SourcedValue]) -> list[ConfigIssue]:
    """Returns the issues with the location where the key was given."""
    located = []
    for issue in issues:
        source = given.get(issue.key or "")
        if source is not None and issue.location is None:
            value = source.value if issue.value is UNSET else issue.value
            issue = replace(issue, location=source.location, value=value)
        located.append(issue)
    return located


def _prefix_locations(lines: Sequence[str], given: Mapping[str, SourcedValue]) -> list[str]:
    """Returns each line after the location where its key was given."""
    located = []
    for line in lines:
        source = given.get(line.partition(" ")[0].rstrip(":"))
        located.append(f"{source.location}: {line}" if source else line)
    return located
