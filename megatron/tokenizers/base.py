"""What every tokenizer promises, so that no one else asks which kind it is.

A tokenizer is a value: it is built from files, never changes, and can be pickled, so that it travels to worker
processes. The promises, which one conformance test checks for every registered kind:

- Every id that `encode` gives is in [0, vocab_size).
- `decode(encode(text)) == text` for every text, unless the tokenizer's own file asks for a normalisation that loses
  something (`lossless` says which).
- No text encodes to `eod` or to another special token: text that spells `<|endoftext|>` is ordinary text. Documents
  are parted by the caller, who appends `eod` itself. (A vocabulary that cannot spell a character says so with its
  token for unknown text, which is the one exception.)
- Nothing is added by `encode`: no beginning-of-text token, no padding, no truncation, whatever the file says.
- `encode_with_special_tokens` is for text that a model reads, such as a prompt or what a chat template made: special
  tokens that the text spells become their ids. It adds nothing either; what a tokenizer puts before a text is
  `prefix_ids`. What it would put behind one (an end token) has no place where a model goes on with the text.
- `encode_batch(texts)` and `encode_arrays(texts)` equal `[encode(text) for text in texts]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

END_OF_DOCUMENT = "<|endoftext|>"

# What normalisers, stripping and added spaces change: outer and repeated spaces, line ends, case, composed and
# decomposed accents, ligatures and wide forms, a zero-width joiner, a character outside the basic plane.
DELICATE = " \t A  b\r\n\ne\u0301 \u00e9 \ufb01 \uff21\u00a0\u200d \U0001f469 <|endoftext|> "


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text into token ids and back.

    vocab_size: how many ids there are [tokens], before any padding. eod: the id that ends a document.
    lossless: whether decoding gives every text back unchanged. engine: what `encode_arrays` runs on, for people.
    begin: the id that is before a text that has nothing before it: a begin token where the tokenizer names one, else
    `eod`.
    special_tokens: the text of every special token that has one, and its id. prefix_ids: the ids that the tokenizer
    itself puts before a text that a model reads, such as LLaMA's `<s>`; empty for most.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int: ...

    @property
    def lossless(self) -> bool: ...

    @property
    def engine(self) -> str: ...

    @property
    def begin(self) -> int: ...

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    @property
    def prefix_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]:
        """The token ids of one text; an empty text has none."""
        ...

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The token ids of one text, where special tokens that it spells are their ids; nothing is added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, faster than one after another."""
        ...

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text as an integer array [tokens]: the fastest way, for whole corpora."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. Special tokens and ids beyond the vocabulary leave no text."""
        ...

    def bytes_of(self, token: int) -> bytes | None:
        """What one id spells, in UTF-8: of a part of a character its bytes. None where that is unknown."""
        ...


def bytes_of_piece(piece: str) -> bytes | None:
    """The byte of a piece such as `<0xE2>`, by which some vocabularies spell what they lack; None of other pieces."""
    found = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes.fromhex(found[1]) if found else None


def as_array(ids: Sequence[int]) -> np.ndarray:
    """Ids as an array [tokens]."""
    return np.array(ids, np.int32)


def split_at(text: str, tokens: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """The stretches of a text, without empty ones: ordinary text with None, and a token's text with its id.

    Where two tokens begin at the same place the longer one is meant.
    """
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if longest_first else [text]
    for at, part in enumerate(parts):
        if part:
            yield part, tokens[part] if at % 2 else None
