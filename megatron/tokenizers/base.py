"""What every tokenizer promises, so that no one else asks which kind it is.

A tokenizer is a value: it is built from files, never changes, and can be pickled, so that it travels to worker
processes. The promises, which one conformance test checks for every registered kind:

- Every id that `encode` gives lies in [0, vocab_size).
- `decode(encode(text)) == text` for every text, unless the tokenizer's own file asks for a normalisation that loses
  something (`lossless` says which).
- No text encodes to `eod` or to another special token: text that spells `<|endoftext|>` is ordinary text. Documents
  are parted by the caller, who appends `eod` itself.
- Nothing is added by `encode`: no beginning-of-text token, no padding, no truncation, whatever the file says.
- `encode_batch(texts)` equals `[encode(text) for text in texts]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text into token ids and back.

    vocab_size: how many ids there are [tokens], before any padding. eod: the id that ends a document.
    lossless: whether decoding gives every text back unchanged.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int: ...

    @property
    def lossless(self) -> bool: ...

    def encode(self, text: str) -> list[int]:
        """The token ids of one text; an empty text has none."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, faster than one after another."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. Special tokens and ids beyond the vocabulary leave no text."""
        ...
