"""Keys that a YAML may leave out and that resolving always fills, as the type they then have."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")


def known(value: Value | None) -> Value:
    """The value of a key of a resolved configuration, which is never None."""
    assert value is not None, "resolving fills this key or refuses the configuration"
    return value
