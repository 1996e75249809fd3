"""Documents that spell special tokens: found fast enough to look at every document of a corpus."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

_START = 2  # characters: texts without the start of any token need no closer look


def spells_one(text: str, tokens: tuple[str, ...]) -> bool:
    """Whether a text spells one of the special tokens."""
    return any(start in text and found.search(text) is not None for start, found in _patterns(tokens))


@lru_cache(maxsize=8)
def _patterns(tokens: tuple[str, ...]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """The tokens by how they start."""
    groups: dict[str, list[str]] = {}
    for token in tokens:
        if token:
            groups.setdefault(token[:_START], []).append(token)
    return tuple((start, _any_of(group)) for start, group in groups.items())


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))
