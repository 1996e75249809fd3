"""Tables that benchmarks write into the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_between(path: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Replaces the text between two marks of a page. Raises ValueError where a mark is missing.

    Args:
        path: The page.
        begin: The line before the text.
        end: The line behind it.
        lines: The new text.
    """
    text = path.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{path} has no lines {begin} and {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text("\n".join([before + begin, "", *lines, "", end]) + after, encoding="utf-8")
