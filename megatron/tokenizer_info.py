"""What is written down about a tokenizer, beside token files and in checkpoints, and whether two are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Words, numbers, white space, code and several scripts: two vocabularies part it alike only if they are the same.
PROBE = (
    "The quick brown fox jumps over the lazy dog, 12345.678 times. It's naïve — isn't it?\n\n"
    "def measure(self, values: list[int]) -> float:\n    return sum(values) / max(len(values), 1)  # mean\n"
    "\tThe theory of language, government and international history; información über größere Häuser.\n"
    "Съешь ещё этих мягких булок. 東京都の天気は晴れ。 مرحبا بالعالم नमस्ते दुनिया 😀\r\n"
    'https://www.example.org/path?query=value&other=1 {"name": [0, 1, null]} $x^2 + y_1 \\leq 42$\n'
)
FROM_FILES = frozenset({"HFTokenizer", "PretrainedFromHF", "HFGPT2Tokenizer", "GPT2BPETokenizer", "TiktokenTokenizer"})
"""Kinds of tokenizer that may hold the same vocabulary under another name."""


class Encodes(Protocol):
    """What is asked of a tokenizer to tell it from others."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int: ...

    def encode(self, text: str) -> Sequence[int]: ...


@dataclass(frozen=True)
class TokenizerInfo:
    """What is written down about a tokenizer.

    kind: as tokenizer_type names it. vocab_size: [tokens], before padding. eod: the id that ends each document, or None
    when none is appended. fingerprint: of the ids that it gives a known text, the same wherever its files lie.
    """

    kind: str
    vocab_size: int
    eod: int | None
    fingerprint: str | None = None

    def __str__(self) -> str:
        end = "no end of document" if self.eod is None else f"end of document {self.eod}"
        known = "" if self.fingerprint is None else f", fingerprint {self.fingerprint}"
        return f"{self.kind} of {self.vocab_size:,} tokens, {end}{known}"

    def agrees_with(self, other: TokenizerInfo) -> bool:
        """Whether both can be the same tokenizer, by all that both say.

        The kind decides only where no fingerprint does: kinds that read the same files may go by another name.
        """
        ends = {facts.eod for facts in (self, other)} - {None}
        if self.vocab_size != other.vocab_size or len(ends) > 1:
            return False
        if self.fingerprint is not None and other.fingerprint is not None:
            return self.fingerprint == other.fingerprint
        return self.kind == other.kind or {self.kind, other.kind} <= FROM_FILES


def facts_of(kind: str, tokenizer: Encodes, *, append_eod: bool = True) -> TokenizerInfo:
    """The facts of a tokenizer. append_eod: whether its end of document is behind each document."""
    ids = [int(token) for token in tokenizer.encode(PROBE)]
    fingerprint = hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
    return TokenizerInfo(kind, tokenizer.vocab_size, tokenizer.eod if append_eod else None, fingerprint)
