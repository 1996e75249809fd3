"""Types shared by sections. Lists in a YAML become tuples, since a section is frozen."""

from typing import Annotated, Any

from pydantic import Field

Strings = Annotated[tuple[str, ...], Field(strict=False)]
"""A list of strings."""

Numbers = Annotated[tuple[float, ...], Field(strict=False)]
"""A list of numbers."""

Integers = Annotated[tuple[int, ...], Field(strict=False)]
"""A list of integers."""

Items = Annotated[tuple[Any, ...], Field(strict=False)]
"""A list of anything."""

Table = dict[str, Any]
"""A nested mapping."""
