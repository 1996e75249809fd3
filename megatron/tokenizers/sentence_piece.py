"""SPMTokenizer: a sentencepiece .model, such as those of LLaMA and Mistral.

The piece `<|endoftext|>` ends a document where the model has one, else its end-of-sentence piece does. A text that
spells the end of a document is spelt out character by character.

Source: arXiv:1808.06226.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megatron.errors import ConfigError
from megatron.tokenizers.base import DELICATE, END_OF_DOCUMENT, as_array


class SPMTokenizer:
    """A sentencepiece model. Raises ConfigError when the file is missing, not a model, or has no end."""

    engine = "sentencepiece"

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        remedy = "give the .model that sentencepiece or tools/train_tokenizer.py wrote"
        if vocab_file is None:
            raise ConfigError.of("SPMTokenizer needs a .model", key="vocab_file", value=None, remedy=remedy)
        try:
            content = Path(vocab_file).read_bytes()
        except OSError as fault:
            what = f"cannot read the tokenizer ({fault.strerror})"
            raise ConfigError.of(what, key="vocab_file", value=vocab_file, remedy=remedy) from fault
        self._build(content, vocab_file)

    def _build(self, content: bytes, where: str) -> None:
        self._content, self._where = content, where
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size: int = model.get_piece_size()
        except Exception as fault:  # the library raises nothing narrower
            remedy = "give the .model that sentencepiece or tools/train_tokenizer.py wrote"
            what = "this is not a sentencepiece model"
            raise ConfigError.of(what, key="vocab_file", value=where, remedy=remedy) from fault
        self._model = model
        named = model.piece_to_id(END_OF_DOCUMENT)
        self.eod: int = model.eos_id() if named == model.unk_id() else named
        if self.eod < 0:
            raise ConfigError.of(
                f"this model has neither {END_OF_DOCUMENT} nor an end of sentence, so nothing ends a document",
                key="vocab_file",
                value=where,
                remedy="train it with an end of sentence (tools/train_tokenizer.py --tokenizer-type sentencepiece)",
            )
        self._special = frozenset(token for token in range(self.vocab_size) if model.is_control(token)) | {self.eod}
        spelt = [model.piece_to_id(character) for character in model.id_to_piece(self.eod)]
        self._spelt = [token for token in spelt if token != self.eod]
        self.lossless: bool = self.decode(self.encode(DELICATE)) == DELICATE

    def encode(self, text: str) -> list[int]:
        """The token ids of one text."""
        return self._unforged(self._model.encode(text, out_type=int))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        return [self._unforged(ids) for ids in self._model.encode(list(texts), out_type=int, num_threads=1)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text as arrays [tokens]."""
        return [as_array(ids) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        known = [int(token) for token in ids if 0 <= token < self.vocab_size and token not in self._special]
        text: str = self._model.decode(known)
        return text

    def _unforged(self, ids: list[int]) -> list[int]:
        if self.eod not in ids:
            return ids
        return [piece for token in ids for piece in (self._spelt if token == self.eod else (token,))]

    def __getstate__(self) -> tuple[bytes, str]:
        return self._content, self._where

    def __setstate__(self, state: tuple[bytes, str]) -> None:
        self._build(*state)
