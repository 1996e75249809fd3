"""Registries of components: one for each configuration key that names a component, open to plugins.

A package outside this tree adds components by a module that registers them:

    from megatron.registry import NORMS, NormEntry NORMS.register(NormEntry("dyt", "my_package.dyt:DynamicTanh",
    "Dynamic tanh", tensors=("weight", "bias")))

The module is imported by every process, the launcher too, before it reads a name: modules in the environment variable
NEOX_PLUGINS, separated by commas, and the entry points of group `neox.plugins` of installed packages. It must not
import torch; the targets are imported on first use.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron.errors import ConfigError
from megatron.registry.entry import Entry

PLUGINS = "NEOX_PLUGINS"
"""Environment variable: modules that register components, separated by commas."""
ENTRY_POINTS = "neox.plugins"
"""Group of the entry points that name such modules."""


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Returns the closest name, or None when nothing is close."""
    known = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return known[close[0]] if close else None


@cache
def load_plugins(named: str) -> None:
    """Imports the modules that register components, once per process.

    named: the value of NEOX_PLUGINS. Raises ConfigError when one of these modules cannot be found.
    """
    for module in filter(None, (part.strip() for part in named.split(","))):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ConfigError.of(
                f"there is no module {error.name}",
                key=PLUGINS,
                value=module,
                hint="put its folder on PYTHONPATH, or install its package",
            ) from error
    if _has_entry_points():
        from importlib.metadata import entry_points

        for point in entry_points(group=ENTRY_POINTS):
            point.load()


def _has_entry_points() -> bool:
    """True if an installed package declares plugins; importlib.metadata would take ten times as long to say no."""
    for folder in sys.path:
        for kind in ("*.dist-info", "*.egg-info"):
            for path in Path(folder).glob(f"{kind}/entry_points.txt"):
                if ENTRY_POINTS.encode() in path.read_bytes():
                    return True
    return False


E = TypeVar("E", bound=Entry)


class Registry(Generic[E]):
    """The components that one configuration key can name."""

    def __init__(self, kind: str, key: str, entries: Iterable[E]) -> None:
        """Lists the built-in components.

        Args:
            kind: a noun for messages ("norm").
            key: the configuration key that names one of them.
            entries: the built-in components, in the order of messages.
        """
        self.kind = kind
        self.key = key
        self._entries: dict[str, E] = {}
        for entry in entries:
            self.register(entry)

    def register(self, entry: E) -> None:
        """Adds a component. Raises ValueError when the name is taken by another one."""
        if self._entries.get(entry.name, entry) != entry:
            raise ValueError(f"there is a {self.kind} named {entry.name} already")
        self._entries[entry.name] = entry

    def _all(self) -> dict[str, E]:
        """Returns all entries by name, with those of plugins."""
        load_plugins(os.environ.get(PLUGINS, ""))
        return self._entries

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in the order of registration."""
        return tuple(self._all())

    @property
    def built_in(self) -> tuple[E, ...]:
        """The entries registered so far. Loads no plugins, so that modules may read it at import."""
        return tuple(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[E]:
        return iter(tuple(self._all().values()))

    def nearest(self, name: str) -> str | None:
        """Returns the listed name closest to a misspelt one, or None."""
        return nearest_name(name, self._all())

    def entry(self, name: str) -> E:
        """Returns the entry of that name. Raises ConfigError, with the nearest name, when there is none."""
        entries = self._all()
        if name in entries:
            return entries[name]
        close = self.nearest(name)
        choices = ", ".join(self.names)
        hint = f"did you mean {close}? The choices are {choices}" if close else f"the choices are {choices}"
        raise ConfigError.of(f"there is no {self.kind} of this name", key=self.key, value=name, hint=hint)

    def load(self, name: str) -> Any:
        """Imports and returns the object. Raises ConfigError when a package that its extra installs is missing."""
        entry = self.entry(name)
        try:
            return load_target(entry.target)
        except ModuleNotFoundError as error:
            ours = (error.name or "").split(".")[0] == "megatron"
            if ours or entry.extra is None:
                raise
            raise ConfigError.of(
                f"this {self.kind} needs the package {error.name}, which is not installed",
                key=self.key,
                value=name,
                hint=f"pip install neox[{entry.extra}]",
            ) from error


def load_target(target: str) -> Any:
    """Imports `module:attribute`."""
    module_name, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module_name), attribute)
