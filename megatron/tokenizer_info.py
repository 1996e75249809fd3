"""Identity of a tokenizer, stored beside token files and in checkpoints, and its comparison; tokens for masking."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# Words, numbers, white space, code and several scripts: only equal vocabularies give equal ids.
PROBE = (
    "The quick brown fox jumps over the lazy dog, 12345.678 times. It's naïve — isn't it?\n\n"
    "def measure(self, values: list[int]) -> float:\n    return sum(values) / max(len(values), 1)  # mean\n"
    "\tThe theory of language, government and international history; información über größere Häuser.\n"
    "Съешь ещё этих мягких булок. 東京都の天気は晴れ。 مرحبا بالعالم नमस्ते दुनिया 😀\r\n"
    'https://www.example.org/path?query=value&other=1 {"name": [0, 1, null]} $x^2 + y_1 \\leq 42$\n'
)
FROM_FILES = frozenset({"HFTokenizer", "PretrainedFromHF", "HFGPT2Tokenizer", "GPT2BPETokenizer", "TiktokenTokenizer"})
"""Kinds of tokenizer that may hold the same vocabulary under another name."""
_CONTRACTIONS, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
QWEN3_5 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
)
"""Patterns by which Qwen2Tokenizer and Qwen3_5Tokenizer of transformers 5.23 split a text before merges."""


class EncodingTokenizer(Protocol):
    """The part of a tokenizer that identifies it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int: ...

    def encode(self, text: str) -> Sequence[int]: ...


@dataclass(frozen=True)
class TokenizerInfo:
    """Identity of a tokenizer."""

    kind: str
    """The name of its tokenizer_type."""
    vocab_size: int
    """Its ids before padding [tokens]."""
    eod: int | None
    """The id that ends each document; None when none is appended."""
    fingerprint: str | None = None
    """Hash of the ids of a fixed text, which does not depend on the path of its files."""

    @classmethod
    def of_checkpoint(cls, facts: Mapping[str, Any]) -> TokenizerInfo:
        """Reads what a checkpoint keeps of its run's tokenizer."""
        return cls(facts["tokenizer_type"], facts["vocab_size"], facts["eod"], facts.get("fingerprint"))

    def __str__(self) -> str:
        end = "no end of document" if self.eod is None else f"end of document {self.eod}"
        known = "" if self.fingerprint is None else f", fingerprint {self.fingerprint}"
        return f"{self.kind} of {self.vocab_size:,} tokens, {end}{known}"

    def agrees_with(self, other: TokenizerInfo) -> bool:
        """Returns whether both can be the same tokenizer.

        The kind is compared only where a fingerprint is missing: several kinds read the same files.
        """
        ends = {info.eod for info in (self, other)} - {None}
        if self.vocab_size != other.vocab_size or len(ends) > 1:
            return False
        if self.fingerprint is not None and other.fingerprint is not None:
            return self.fingerprint == other.fingerprint
        return self.kind == other.kind or {self.kind, other.kind} <= FROM_FILES


@dataclass(frozen=True)
class MaskingTokens:
    """What a masked language model needs of a vocabulary: special tokens, and which pieces continue a word."""

    cls: int
    """The id before a sample."""
    sep: int
    """The id behind each segment."""
    mask: int
    """The id in the position of a token that is to be predicted."""
    pad: int
    """The id behind a sample that is not full."""
    vocab_size: int
    """Number of ids, from which random ones are drawn [tokens]."""
    continues: bytes
    """A byte an id: 1 where the piece continues the word before it, so that both are masked together."""


@dataclass(frozen=True)
class ClassTokens:
    """What a sample of a task needs of a vocabulary."""

    cls: int
    """The id before a sample."""
    sep: int
    """The id behind each text."""
    pad: int
    """The id behind a sample that is not full."""
    doubled: bool = False
    """Whether two separators stand between the texts of a pair, as in RoBERTa."""


@dataclass(frozen=True)
class SpanTokens:
    """What span corruption needs of a vocabulary."""

    words: MaskingTokens
    """Which pieces continue a word, and the id of padding."""
    start: int
    """The id that the decoder starts with."""
    end: int
    """The id behind the last span."""
    sentinels: tuple[int, ...]
    """The ids that stand for the first span of a sample, the second one, ..."""
    source_end: int | None = None
    """The id behind what the encoder reads, where the vocabulary is T5's; None where nothing is."""


def describe_tokenizer(kind: str, tokenizer: EncodingTokenizer, *, append_eod: bool = True) -> TokenizerInfo:
    """Describes a tokenizer. append_eod: whether each document ends with its end-of-document token."""
    ids = [int(token) for token in tokenizer.encode(PROBE)]
    fingerprint = hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
    return TokenizerInfo(kind, tokenizer.vocab_size, tokenizer.eod if append_eod else None, fingerprint)
