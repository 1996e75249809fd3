"""HFTokenizer: any tokenizer.json of the `tokenizers` library, such as the 20B tokenizer or one trained here.

The end of a document is the token `<|endoftext|>`. The file's own wishes that would change a training set are turned
off: special tokens spelt in a text, added beginning and end tokens, truncation and padding.

Source: https://huggingface.co/docs/tokenizers (Tokenizer.encode_special_tokens, encode_batch_fast).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from megatron.errors import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"

# What normalisers, stripping and added spaces change: outer and repeated spaces, line ends, case, composed and
# decomposed accents, ligatures and wide forms, a zero-width joiner, a character outside the basic plane.
_DELICATE = " \t A  b\r\n\ne\u0301 \u00e9 \ufb01 \uff21\u00a0\u200d \U0001f469 <|endoftext|> "


class HFTokenizer:
    """A tokenizer.json.

    Raises ConfigError when the file is not given, missing, not a tokenizer, or has no `<|endoftext|>`.
    """

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        self._build(_read(vocab_file), vocab_file)

    def _build(self, text: str, where: str | None) -> None:
        try:
            tokenizer = FastTokenizer.from_str(text)
        except Exception as fault:  # the library raises nothing narrower
            raise ConfigError.of(
                f"this is not a tokenizer.json ({fault})",
                key="vocab_file",
                value=where,
                remedy="give the tokenizer.json that tools/train_tokenizer.py or the tokenizers library wrote",
            ) from fault
        eod = tokenizer.token_to_id(END_OF_DOCUMENT)
        if eod is None:
            raise ConfigError.of(
                f"this tokenizer has no {END_OF_DOCUMENT} token, which ends a document",
                key="vocab_file",
                value=where,
                remedy=f"add {END_OF_DOCUMENT} to the special tokens of the file",
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Whatever the file calls it, the end of a document is special: no text may spell it.
        tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._where = where
        self.eod: int = eod
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, and every id needs a row in the embedding.
        self.vocab_size: int = max(len(vocabulary), max(vocabulary.values()) + 1)
        self.lossless: bool = self.decode(self.encode(_DELICATE)) == _DELICATE

    def encode(self, text: str) -> list[int]:
        """The token ids of one text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, by all the threads that the library takes (TOKENIZERS_PARALLELISM)."""
        return [encoded.ids for encoded in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def __getstate__(self) -> tuple[str, str | None]:
        """The file's text: what is set on top of it is set again in `__setstate__`."""
        return self._tokenizer.to_str(), self._where

    def __setstate__(self, state: tuple[str, str | None]) -> None:
        self._build(*state)


def _read(vocab_file: str | None) -> str:
    remedy = "give a tokenizer.json, such as one that tools/train_tokenizer.py writes"
    if vocab_file is None:
        raise ConfigError.of("HFTokenizer needs a tokenizer.json", key="vocab_file", value=None, remedy=remedy)
    try:
        return Path(vocab_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        what = "this is not a tokenizer.json, which is UTF-8 text"
        raise ConfigError.of(what, key="vocab_file", value=vocab_file, remedy=remedy) from fault
    except OSError as fault:
        what = f"cannot read the tokenizer ({fault.strerror})"
        raise ConfigError.of(what, key="vocab_file", value=vocab_file, remedy=remedy) from fault
