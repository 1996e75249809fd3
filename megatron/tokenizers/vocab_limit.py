"""A tokenizer that has more tokens than the model has rows in its embedding.

Folders of models may add tokens, to the tokenizer alone, that the weights know nothing of. Such a model reads every
text that spells none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from megatron.errors import RunError
from megatron.tokenizers.base import Tokenizer

_ABRIDGED = 40  # characters of a token's text in a message


class BoundedTokenizer:
    """The tokenizer, for a model with that many rows: a text that has an id beyond them is a RunError.

    vocab_size: of the whole tokenizer, which is what data and checkpoints are held against.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        self.full = tokenizer
        self.rows = rows

    @property
    def vocab_size(self) -> int:
        return self.full.vocab_size

    @property
    def eod(self) -> int:
        return self.full.eod

    @property
    def lossless(self) -> bool:
        return self.full.lossless

    @property
    def engine(self) -> str:
        return self.full.engine

    @property
    def begin(self) -> int:
        return self.full.begin

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self.full.special_tokens

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return self.full.prefix_ids

    def encode(self, text: str) -> list[int]:
        return self._known(self.full.encode(text))

    def encode_with_special_tokens(self, text: str) -> list[int]:
        return self._known(self.full.encode_with_special_tokens(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._known(ids) for ids in self.full.encode_batch(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self.full.encode_arrays(texts)
        for ids in found:
            self._known(ids.tolist())
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return self.full.decode(ids)

    def bytes_of(self, token: int) -> bytes | None:
        return self.full.bytes_of(token)

    def _known(self, ids: list[int]) -> list[int]:
        beyond = max(ids, default=-1)
        if beyond >= self.rows:
            raise RunError.of(
                f"the text has the token {self._named(beyond)}, and the model knows the ids 0 to {self.rows - 1} only",
                location="tokenizer",
                hint="leave the token out, or tune the model to the tokenizer (finetune: true adds the rows)",
            )
        return ids

    def _named(self, number: int) -> str:
        texts: Iterable[str] = (text for text, own in self.special_tokens.items() if own == number)
        text = next(iter(texts), None)
        return str(number) if text is None else f"{number} ({text[:_ABRIDGED]!r})"


def full_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with all of its tokens."""
    return tokenizer.full if isinstance(tokenizer, BoundedTokenizer) else tokenizer


def known_ids(tokenizer: Tokenizer) -> int:
    """How many of the tokenizer's ids the model knows [tokens]."""
    return tokenizer.rows if isinstance(tokenizer, BoundedTokenizer) else tokenizer.vocab_size
