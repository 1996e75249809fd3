"""Values that may be unknown: asserted in a resolved configuration, left out of the rules of one with errors.

A user wants every error at once, and no error that is only an echo of another one. So derivations and rules run
on the values that are good; whoever asks for one that is not gets `UnresolvedValue`, and is left out.
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
    """Return the value of a key that resolving always fills. TypeError where the configuration is not resolved."""
    if value is None:
        raise TypeError("resolving fills this key or refuses the configuration")
    return value


class UnresolvedValue(Exception):
    """A value was asked for that is wrong, or that nobody could read."""


def meant(issues: Iterable[ConfigIssue], names: Collection[str]) -> set[str]:
    """The keys that a hint names: with `did you mean num_layers?`, num_layers is not missing."""
    words = {word for issue in issues for word in re.findall(r"\w+", issue.hint or "")}
    return words & set(names)


def partial(config: Config, unknown: Collection[str]) -> Config:
    """The configuration, which raises UnresolvedValue where one of the unknown keys is read."""
    return cast("Config", _PartialConfig(config, unknown)) if unknown else config


class _PartialConfig:
    """A Config whose sections are watched."""

    def __init__(self, config: Config, unknown: Collection[str]) -> None:
        self._config, self._unknown = config, unknown

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._config, name)
        return _PartialSection(found, self._unknown) if isinstance(found, Section) else found

    def flat(self) -> dict[str, Any]:
        """Every key and its value; None, which no rule minds, for what is not known."""
        return {name: None if name in self._unknown else value for name, value in self._config.flat().items()}


class _PartialSection:
    """A section whose unknown keys cannot be read, through its properties either."""

    def __init__(self, section: Section, unknown: Collection[str]) -> None:
        self._section, self._unknown = section, unknown

    def __getattr__(self, name: str) -> Any:
        if name in self._unknown:
            raise UnresolvedValue(name)
        derived = getattr(type(self._section), name, None)
        if isinstance(derived, property) and derived.fget is not None:
            return derived.fget(self)
        return getattr(self._section, name)
