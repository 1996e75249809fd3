"""SPMTokenizer: a sentencepiece .model, such as those of LLaMA and Mistral.

The piece `<|endoftext|>` ends a document where the model has one, else its end-of-sentence piece does. A text that
spells the end of a document is spelt out character by character.

Where the tokenizer_config.json beside the model names LLaMA's class, every text is read as that class of `transformers`
reads it, in training as in prompts: nothing is normalised, blanks stay, and user-defined symbols part a text as special
tokens do. Without the class the library reads each
stretch of text between special tokens by itself. That file also says whether a begin token is put before a text
(`add_bos_token`).

Source: arXiv:1808.06226.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from megatron.errors import ConfigError
from megatron.tokenizers.base import DELICATE, END_OF_DOCUMENT, as_array, bytes_of_piece, split_at
from megatron.tokenizers.sentence_piece_model import USER, read_model
from megatron.tokenizers.tokenizer_config import Beside, read_beside

# The fields of normalizer_spec, itself field 3 of the model's protocol buffer. What is appended to a model of this form
# overrides what is before it.
_NO_CHARACTER_MAP, _NO_DUMMY_PREFIX, _KEEP_BLANKS = b"\x12\x00", b"\x18\x00", b"\x20\x00"


class SPMTokenizer:
    """A sentencepiece model. Raises ConfigError when the file is missing, not a model, or has no end."""

    engine = "sentencepiece"

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        hint = "give the .model that sentencepiece or tools/train_tokenizer.py wrote"
        if vocab_file is None:
            raise ConfigError.of("SPMTokenizer needs a .model", key="vocab_file", value=None, hint=hint)
        try:
            content = Path(vocab_file).read_bytes()
        except OSError as error:
            what = f"cannot read the tokenizer ({error.strerror})"
            raise ConfigError.of(what, key="vocab_file", value=vocab_file, hint=hint) from error
        self._build(content, vocab_file, read_beside(vocab_file))

    def _build(self, content: bytes, location: str, beside: Beside) -> None:
        self._content, self._where, self._beside = content, location, beside
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size: int = model.get_piece_size()
        except Exception as error:  # the library raises nothing narrower
            hint = "give the .model that sentencepiece or tools/train_tokenizer.py wrote"
            what = "this is not a sentencepiece model"
            raise ConfigError.of(what, key="vocab_file", value=location, hint=hint) from error
        self._model = model
        found = model.piece_to_id(END_OF_DOCUMENT)
        self.eod: int = model.eos_id() if found == model.unk_id() else found
        if self.eod < 0:
            raise ConfigError.of(
                f"this model has neither {END_OF_DOCUMENT} nor an end of sentence, so nothing ends a document",
                key="vocab_file",
                value=location,
                hint="train it with an end of sentence (tools/train_tokenizer.py --tokenizer-type sentencepiece)",
            )
        self._special = frozenset(token for token in range(self.vocab_size) if model.is_control(token)) | {self.eod}
        named = sorted({model.unk_id(), *self._special})
        self.special_tokens: Mapping[str, int] = {model.id_to_piece(token): token for token in named if token >= 0}
        self.begin: int = self.special_tokens.get(beside.begin or "", self.eod)
        self.prefix_ids: tuple[int, ...] = (self.begin,) if beside.adds_begin else ()
        spelt = [model.piece_to_id(character) for character in model.id_to_piece(self.eod)]
        self._spelt = [token for token in spelt if token != self.eod]
        self.lossless: bool = self.decode(self.encode(DELICATE)) == DELICATE

    def encode(self, text: str) -> list[int]:
        """The token ids of one text."""
        return self._unforged(self._between(text, self._symbols))

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The token ids of one text, where special tokens that it spells are their ids.

        With `split_special_tokens` they are text, as in `transformers`.
        """
        if self.splits_special:
            return self.encode(text)
        return self._between(text, {**self._symbols, **self.special_tokens})

    def _between(self, text: str, tokens: Mapping[str, int]) -> list[int]:
        """The ids of a text: of the tokens that it spells, and of what is between them."""
        found: list[int] = []
        for piece, token in split_at(text, tokens):
            found += (token,) if token is not None else self._reader(piece, bool(found)).encode(piece, out_type=int)
        return found

    @cached_property
    def _symbols(self) -> Mapping[str, int]:
        """The user-defined symbols, where LLaMA's class parts a text at them before it puts blanks anywhere."""
        if self._beside.blank is None:
            return {}
        pieces = read_model(self._content).pieces
        return {text: number for number, (text, _, kind) in enumerate(pieces) if kind == USER}

    def _reader(self, text: str, follows: bool) -> sentencepiece.SentencePieceProcessor:
        """The model for a stretch of text. follows: whether a special token is before it."""
        blank = self._beside.blank
        if blank is None:
            return self._model
        # LLaMA's class puts no second blank before a text that begins with one.
        opens = not text.startswith((" ", "\u2581")) and (blank == "always" or (blank == "first" and not follows))
        return self._opening if opens else self._following

    @cached_property
    def _opening(self) -> sentencepiece.SentencePieceProcessor:
        return self._altered(_NO_CHARACTER_MAP + _KEEP_BLANKS)

    @cached_property
    def _following(self) -> sentencepiece.SentencePieceProcessor:
        return self._altered(_NO_CHARACTER_MAP + _NO_DUMMY_PREFIX + _KEEP_BLANKS)

    def _altered(self, fields: bytes) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self._content + bytes((0x1A, len(fields))) + fields)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        if self._beside.blank is not None:
            return [self.encode(text) for text in texts]
        return [self._unforged(ids) for ids in self._model.encode(list(texts), out_type=int, num_threads=1)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text as arrays [tokens]."""
        return [as_array(ids) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        known = [int(token) for token in ids if 0 <= token < self.vocab_size and token not in self._special]
        blank = self._beside.blank
        text: str = (self._model if blank is None else self._following).decode(known)
        return text if blank in (None, "never") else text.removeprefix(" ")

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of a piece, its blank included; None of ids without text."""
        if not 0 <= token < self.vocab_size or token in self._special or token == self._model.unk_id():
            return None
        piece: str = self._model.id_to_piece(token)
        return bytes_of_piece(piece) if self._model.is_byte(token) else piece.replace("\u2581", " ").encode()

    @property
    def blank(self) -> str | None:
        """How LLaMA's class, which the tokenizer_config.json names, puts a blank before a text; None without it."""
        return self._beside.blank

    @property
    def splits_special(self) -> bool:
        """Whether special tokens that a prompt spells are text, as the tokenizer_config.json says."""
        return self._beside.splits_special

    def own_ids(self, text: str) -> list[int]:
        """What the library reads of a text by the .model alone, whatever is beside it."""
        ids: list[int] = self._model.encode(text, out_type=int)
        return ids

    @property
    def own_begin(self) -> int | None:
        """The id that the .model keeps for the begin of a text, where it has one."""
        number: int = self._model.bos_id()
        return number if number >= 0 else None

    @property
    def unknown(self) -> int:
        """The id of what the vocabulary cannot spell."""
        number: int = self._model.unk_id()
        return number

    def piece(self, number: int) -> str:
        """The text of an id."""
        text: str = self._model.id_to_piece(number)
        return text

    def _unforged(self, ids: list[int]) -> list[int]:
        if self.eod not in ids:
            return ids
        return [piece for token in ids for piece in (self._spelt if token == self.eod else (token,))]

    def __getstate__(self) -> tuple[bytes, str, Beside]:
        return self._content, self._where, self._beside

    def __setstate__(self, state: tuple[bytes, str, Beside]) -> None:
        self._build(*state)
