"""Lets rules run on a partially invalid configuration.

All errors are reported at once, and no error that only follows from another one. So derivations and rules run on the
valid values; one that reads an invalid value gets `UnresolvedValue` and is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from megatron.config.field import Section
from megatron.errors import ConfigIssue

if TYPE_CHECKING:
    from megatron.config.config import Config

Value = TypeVar("Value")


def require(value: Value | None) -> Value:
    """Returns the value of a key that resolving always sets. Raises TypeError for None."""
    if value is None:
        raise TypeError("resolving fills this key or refuses the configuration")
    return value


class UnresolvedValue(Exception):
    """A value was read that is invalid or unknown."""


def keys_in_hints(issues: Iterable[ConfigIssue], names: Collection[str]) -> set[str]:
    """Returns the keys in hints: after `did you mean num_layers?`, num_layers is not missing."""
    words = {word for issue in issues for word in re.findall(r"\w+", issue.hint or "")}
    return words & set(names)


def hide_unknown(config: Config, unknown: Collection[str]) -> Config:
    """Wraps the configuration so that reading an unknown key raises UnresolvedValue."""
    return cast("Config", _MaskedConfig(config, unknown)) if unknown else config


class _MaskedConfig:
    """A Config with masked sections."""

    def __init__(self, config: Config, unknown: Collection[str]) -> None:
        self._config, self._unknown = config, unknown

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._config, name)
        return _MaskedSection(found, self._unknown) if isinstance(found, Section) else found

    def flat(self) -> dict[str, Any]:
        """Returns every key and its value, `None` for unknown keys; rules skip `None`."""
        return {name: None if name in self._unknown else value for name, value in self._config.flat().items()}


class _MaskedSection:
    """A section whose unknown keys cannot be read, directly or through properties."""

    def __init__(self, section: Section, unknown: Collection[str]) -> None:
        self._section, self._unknown = section, unknown

    def __getattr__(self, name: str) -> Any:
        if name in self._unknown:
            raise UnresolvedValue(name)
        derived = getattr(type(self._section), name, None)
        if isinstance(derived, property) and derived.fget is not None:
            return derived.fget(self)
        return getattr(self._section, name)
