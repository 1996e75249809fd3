"""What every tokenizer of the `tokenizers` library shares, whichever files it was built from.

The end of a document is one special token. Settings of the file that would change a training set are turned off:
special tokens spelt in a text, added beginning and end tokens, truncation, padding and BPE's dropout. Whole corpora are
encoded by the engine of `byte_level.py` where it gives the same ids.

LLaMA's class, where the tokenizer_config.json beside the file names it, reads every text its own way (llama_class.py).
What a model reads (`encode_with_special_tokens`) is encoded by a second copy, which keeps to what the file says of
special tokens.

Source: https://huggingface.co/docs/tokenizers (Tokenizer.encode_special_tokens, encode_batch_fast).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from megatron.errors import ConfigError
from megatron.tokenizers.base import DELICATE, as_array, bytes_of_piece
from megatron.tokenizers.byte_level import ByteLevelEngine, byte_alphabet, make_engine
from megatron.tokenizers.llama_class import as_read, rebuild
from megatron.tokenizers.spelt_tokens import fallback_bytes, special_ids, with_bytes_as_text, without_special_tokens
from megatron.tokenizers.tokenizer_config import Beside


class FromTokenizers:
    """A tokenizer of the tokenizers library, prepared for training sets.

    Raises ConfigError when the vocabulary has no such end token.

    Args:
        tokenizer: The library's tokenizer.
        eod: Token that ends a document.
        location: Its file, for messages.
        beside: Content of tokenizer_config.json.
        own: Description of the end token in the file, where the tokenizer does not tell it.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        eod: str,
        location: str | None,
        beside: Beside | None = None,
        own: AddedToken | None = None,
    ) -> None:
        number = tokenizer.token_to_id(eod)
        if number is None:
            raise ConfigError.of(
                f"this tokenizer has no {eod} token, which ends a document",
                key="vocab_file",
                value=location,
                hint=f"add {eod} to the special tokens of the file",
            )
        self._own = own or tokenizer.get_added_tokens_decoder().get(number)
        self._beside = beside or Beside()
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None  # else a text has other ids each time
        rebuild(tokenizer, self._beside.blank)
        # Whatever the file calls it, the end of a document is special: no text may spell it.
        tokenizer.add_special_tokens([AddedToken(eod, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._eod_token = eod
        self._where = location
        self.eod: int = number
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, and every id needs a row in the embedding.
        self.vocab_size: int = max(len(vocabulary), max(vocabulary.values()) + 1)
        self._bytes = fallback_bytes(tokenizer)
        speller = with_bytes_as_text(tokenizer)
        self.lossless: bool = speller.decode(self.encode(DELICATE), skip_special_tokens=True) == DELICATE

    @cached_property
    def _plain(self) -> FastTokenizer:
        """The tokenizer of texts to train on, whose ids of a text are no special tokens."""
        return without_special_tokens(self._tokenizer, self._never_spelt)

    @cached_property
    def _never_spelt(self) -> Mapping[str, int]:
        """The special tokens, and bytes that the file calls special, without those that it lists as ordinary ones."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        ordinary = {token.content for token in added if not token.special}
        return {text: number for text, number in self._called_special.items() if text not in ordinary}

    @cached_property
    def _spelt(self) -> Mapping[int, list[int]]:
        """Ids in place of special tokens that texts get all the same: those of the characters that spell them."""
        texts = {number: text for text, number in self._never_spelt.items()}
        found = special_ids(self._plain, self._never_spelt)
        spelt = {
            number: [
                one
                for character in texts[number]
                for one in self._plain.encode(character, add_special_tokens=False).ids
            ]
            for number in found
        }
        return {number: [one for one in ids if one not in found] for number, ids in spelt.items()}

    def _without_special(self, ids: list[int]) -> list[int]:
        if self._spelt.keys().isdisjoint(ids):
            return ids
        return [one for number in ids for one in self._spelt.get(number, (number,))]

    @cached_property
    def _engine(self) -> tuple[ByteLevelEngine | None, str]:
        engine, words = make_engine(self._plain)
        return (None, "tokenizers (its vocabulary spells special tokens)") if self._spelt else (engine, words)

    @property
    def engine(self) -> str:
        """What encodes whole corpora, in words."""
        return self._engine[1]

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """The text of each special token and its id: those of the file and those that tokenizer_config.json names.

        Bytes that the model falls back to are text, also where the file calls them special.
        """
        spelling = self._bytes - {self.eod}
        return {text: number for text, number in self._called_special.items() if number not in spelling}

    @cached_property
    def _called_special(self) -> Mapping[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        found = {token.content: number for number, token in sorted(added.items()) if token.special}
        named = {text: self._tokenizer.token_to_id(text) for text in self._beside.special}
        return found | {text: number for text, number in named.items() if number is not None}

    @cached_property
    def begin(self) -> int:
        """The begin token, or else the end token, that tokenizer_config.json names; the end of a document without."""
        named = (self._beside.begin, self._beside.end)
        ids = [self._tokenizer.token_to_id(text) for text in named if text is not None]
        return next((number for number in ids if number is not None), self.eod)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """What the file's post-processor puts before a text; where it has none, the begin token that is asked for."""
        begin = self._beside.begin if self._beside.adds_begin else None
        number = None if begin is None else self._tokenizer.token_to_id(begin)
        return self._processed_prefix() if number is None else (number,)

    def _processed_prefix(self) -> tuple[int, ...]:
        for text in ("a", "0", ".", " "):
            plain, framed = (self._tokenizer.encode(text, add_special_tokens=add).ids for add in (False, True))
            for start in range(len(framed) - len(plain) + 1) if plain else ():
                if framed[start : start + len(plain)] == plain:
                    return tuple(framed[:start])
        return ()

    @cached_property
    def _reader(self) -> FastTokenizer:
        """The tokenizer as the file and tokenizer_config.json describe it, for text that a model reads."""
        reader = FastTokenizer.from_str(self._tokenizer.to_str())
        if self._own is not None:
            flags = {name: getattr(self._own, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
            reader.add_special_tokens([AddedToken(self._own.content, special=True, **flags)])
        known = {token.content for token in reader.get_added_tokens_decoder().values()}
        reader.add_special_tokens([AddedToken(text) for text in self._called_special if text not in known])
        reader.encode_special_tokens = self._beside.splits_special
        return reader

    def encode(self, text: str) -> list[int]:
        """The token ids of one text."""
        return self._without_special(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The token ids of one text, where special tokens that it spells are their ids.

        With `split_special_tokens` they are text, as in `transformers`.
        """
        ids: list[int] = self._reader.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, and where each token's text starts and ends [characters]."""
        encoded = self._reader.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, by all the threads that the library takes (TOKENIZERS_PARALLELISM)."""
        found = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._without_special(encoded.ids) for encoded in found]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text as arrays, by the fastest engine that gives the same ids."""
        engine = self._engine[0]
        if engine is not None:
            return [engine.encode(text) for text in texts]
        return [as_array(ids) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        text: str = self._speller.decode(list(ids), skip_special_tokens=True)
        return text

    @cached_property
    def _speller(self) -> FastTokenizer:
        return with_bytes_as_text(self._tokenizer if self._beside.blank is None else self._reader)

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of a byte-level token, or of a piece that spells a byte; None of others."""
        written = token not in self._added or token in self._bytes
        piece = self._tokenizer.id_to_token(token) if written else None
        if piece is None:
            return None
        if '"ByteLevel"' not in self._decoder:
            return bytes_of_piece(piece) if '"ByteFallback"' in self._decoder else None
        known = self._alphabet
        return bytes(map(known.__getitem__, piece)) if all(map(known.__contains__, piece)) else None

    @property
    def roles(self) -> dict[str, Any]:
        """Settings of tokenizer_config.json, such as names of special tokens, of a kind that knows them; else none."""
        return {}

    @property
    def pieces(self) -> list[str]:
        """The text of each id in the vocabulary; empty for an id without one."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        found = [""] * self.vocab_size
        for piece, number in vocabulary.items():
            found[number] = piece
        return found

    @cached_property
    def _alphabet(self) -> Mapping[str, int]:
        return {character: byte for byte, character in enumerate(byte_alphabet())}

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _decoder(self) -> str:
        return json.dumps(json.loads(self._tokenizer.to_str())["decoder"])

    @property
    def splits_special(self) -> bool:
        """Whether special tokens that a prompt spells are text, as the tokenizer_config.json says."""
        return self._beside.splits_special

    @property
    def end(self) -> str:
        """The token that ends a document."""
        return self._eod_token

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None where the vocabulary lacks it."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def to_json(self, file: str | None = None) -> str:
        """The text of a tokenizer.json that gives a model's ids under any class. file: the text that was read."""
        content: str = self._tokenizer.to_str() if file is None else _without_dropout(file)
        return as_read(content, self._beside.blank)

    def __getstate__(self) -> tuple[str, str, str | None, Beside, AddedToken | None]:
        """The file's text: what is set on top of it is set again in `__setstate__`."""
        return self._tokenizer.to_str(), self._eod_token, self._where, self._beside, self._own

    def __setstate__(self, state: tuple[str, str, str | None, Beside, AddedToken | None]) -> None:
        content, eod, location, beside, own = state
        FromTokenizers.__init__(self, FastTokenizer.from_str(content), eod, location, beside, own)


def _without_dropout(content: str) -> str:
    """The text of a tokenizer.json whose BPE leaves no merges to chance; the same text where it does not anyway."""
    if not re.search(r'"dropout":\s*[0-9]', content):
        return content
    data = json.loads(content)
    if not data["model"].get("dropout"):
        return content
    data["model"]["dropout"] = None
    return json.dumps(data, ensure_ascii=False, indent=2)


def read_file(name: str | None, *, kind: str, key: str, needs: str) -> str:
    """The text of a tokenizer's file. Raises ConfigError.

    Args:
        name: The file's name.
        kind: The tokenizer type, for messages.
        key: The configuration key that names it.
        needs: What the file is, for messages.
    """
    hint = f"give {needs}"
    if name is None:
        raise ConfigError.of(f"{kind} needs {needs}", key=key, value=None, hint=hint)
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError.of("this file is not UTF-8 text", key=key, value=name, hint=hint) from error
    except OSError as error:
        what = f"cannot read the tokenizer ({error.strerror})"
        raise ConfigError.of(what, key=key, value=name, hint=hint) from error


def parse(content: str, location: str | None) -> FastTokenizer:
    """The tokenizer of a tokenizer.json's text. Raises ConfigError."""
    try:
        return FastTokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        what, hint = _unreadable(content, error)
        raise ConfigError.of(what, key="vocab_file", value=location, hint=hint) from error


def _unreadable(content: str, error: Exception) -> tuple[str, str]:
    """What is wrong with the text of a tokenizer.json, and the hint.

    Args:
        content: The text.
        error: The library's own.
    """
    if content.startswith("version https://git-lfs"):
        return "this is a pointer of git-lfs and not the file itself", "git lfs pull, or fetch the file again"
    if "did not match any variant" in str(error) and isinstance(json.loads(content).get("model"), dict):
        version = metadata.version("tokenizers")
        what = f"tokenizers {version} does not know a part of this file ({error})"
        return what, "a newer release may have written it: pip install -U tokenizers"
    hint = "give the tokenizer.json that tools/train_tokenizer.py or the tokenizers library wrote"
    return f"this is not a tokenizer.json ({error})", hint
