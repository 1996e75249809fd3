"""Part a document into sentences, by rules that need no download.

A sentence ends after `.`, `!` or `?`, with the quotes and brackets that close behind it, where white space and then no
lower-case letter follow; or at an empty line. A full stop after a single letter or a usual abbreviation ends none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_END = re.compile(r"""[.!?。！？]+["'”’)\]]*(?=\s)|(?<=[。！？])(?=\S)|\n[ \t]*(?=\n)""")
_NOT_AN_END = re.compile(
    r"(?:\b[^\W\d_]|\b(?:mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|cf|fig|no|vol|pp|jr|sr|inc|ltd|co|al|approx))\.$",
    re.IGNORECASE,
)
_LONGEST_ABBREVIATION = 8  # characters before an end that decide [characters]


@dataclass(frozen=True)
class Sentences:
    """keep_newlines: the white space behind a sentence stays with it, so that all sentences joined are the text."""

    keep_newlines: bool = False

    def split(self, text: str) -> list[str]:
        """The sentences, in order; none is empty. A text of white space alone is one."""
        found = []
        start = 0
        for match in _END.finditer(text):
            end = match.end()
            before = text[max(start, end - _LONGEST_ABBREVIATION) : end]
            if _next_visible(text, end).islower() or _NOT_AN_END.search(before):
                continue
            while end < len(text) and text[end].isspace():
                end += 1
            if end > start:
                found.append(text[start:end])
                start = end
        if start < len(text):
            found.append(text[start:])
        if self.keep_newlines:
            return found
        return [part.strip() for part in found if part.strip()] or [text]


def _next_visible(text: str, at: int) -> str:
    while at < len(text) and text[at].isspace():
        at += 1
    return text[at : at + 1]
