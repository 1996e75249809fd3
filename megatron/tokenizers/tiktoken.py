"""TiktokenTokenizer: a vocabulary of tiktoken, by its public name or from a local file.

A file has a token a line, its bytes in base 64 and its rank. The file says nothing of how words are parted and which
special tokens follow; both belong to a vocabulary that is known by the number of its ranks. `<|endoftext|>` ends a
document (`<|end_of_text|>` in Llama 3's, whose texts begin with `<|begin_of_text|>`).

Source: https://github.com/openai/tiktoken (tiktoken_ext/openai_public.py); Llama 3's model card for its file.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from megatron.errors import ConfigError, RunError
from megatron.tokenizers.base import END_OF_DOCUMENT, split_at
from megatron.tokenizers.byte_level import CL100K_WORDS, GPT2_WORDS, LONG_TEXT, O200K_WORDS, cut
from megatron.tokenizers.tokenizer_config import read_beside

_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>")


@dataclass(frozen=True)
class _Known:
    """words: the pattern of words. special: the special tokens that follow the ranks. size: all ids [tokens]."""

    words: str
    special: dict[str, int]
    size: int


_BEGIN = "<|begin_of_text|>"
_LLAMA3 = {
    _BEGIN: 128000,
    "<|end_of_text|>": 128001,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
}
_KNOWN = {
    50256: _Known(GPT2_WORDS, {END_OF_DOCUMENT: 50256}, 50257),  # gpt2, r50k_base
    50280: _Known(GPT2_WORDS, {END_OF_DOCUMENT: 50256}, 50281),  # p50k_base
    100256: _Known(CL100K_WORDS, {END_OF_DOCUMENT: 100257, "<|endofprompt|>": 100276}, 100277),  # cl100k_base
    128000: _Known(CL100K_WORDS, _LLAMA3, 128256),  # tokenizer.model of Llama 3
    199998: _Known(O200K_WORDS, {END_OF_DOCUMENT: 199999, "<|endofprompt|>": 200018}, 200019),  # o200k_base
}


class TiktokenTokenizer:
    """A vocabulary of tiktoken. vocab_file: the name of an encoding, or a file.

    Raises ConfigError when the name is unknown and no file, the file is damaged or its vocabulary is not known.
    """

    lossless = True
    engine = "tiktoken"

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        if vocab_file is None:
            raise ConfigError.of(
                "TiktokenTokenizer needs the name of an encoding or a file of ranks",
                key="vocab_file",
                value=None,
                hint=f"give one of {', '.join(tiktoken.list_encoding_names())}, or a .tiktoken file",
            )
        self._name = vocab_file
        encoding = _from_file(Path(vocab_file)) if Path(vocab_file).is_file() else _by_name(vocab_file)
        self._encoding = encoding
        special = encoding._special_tokens
        end = next((special[token] for token in _ENDS if token in special), None)
        if end is None:
            what = f"this encoding has no {END_OF_DOCUMENT}, which ends a document"
            raise ConfigError.of(what, key="vocab_file", value=vocab_file)
        self.eod: int = end
        known = _KNOWN.get(len(encoding._mergeable_ranks))
        self.vocab_size: int = max(encoding.n_vocab, known.size if known else 0)
        self._special = frozenset(special.values())
        self.special_tokens: Mapping[str, int] = dict(special)
        self.begin: int = special.get(_BEGIN, end)
        self.prefix_ids: tuple[int, ...] = (special[_BEGIN],) if _BEGIN in special else ()
        self._splits_special = read_beside(vocab_file).splits_special if Path(vocab_file).is_file() else False

    def encode(self, text: str) -> list[int]:
        """The token ids of one text. Raises RunError where the engine cannot part its words."""
        return [token for piece in _pieces(text) for token in self._ordinary(piece)]

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The token ids of one text, where special tokens that it spells are their ids. Raises as `encode` does.

        With `split_special_tokens` in the tokenizer_config.json beside the file they are text.
        """
        if self._splits_special:
            return self.encode(text)
        return [
            token
            for piece, special in split_at(text, self.special_tokens)
            for token in (self.encode(piece) if special is None else (special,))
        ]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text as arrays [tokens]."""
        return [np.concatenate([self._array(piece) for piece in _pieces(text)]) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        known = self._encoding
        pieces = []
        for token in ids:
            if token in self._special:
                continue
            try:
                pieces.append(known.decode_single_token_bytes(token))
            except (KeyError, OverflowError):
                continue  # an id that pads the vocabulary
        return b"".join(pieces).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of an id; None of those that pad the vocabulary."""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return None

    def _ordinary(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except ValueError as error:
            raise _refused(error) from error

    def _array(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(self._encoding._core_bpe.encode_to_tiktoken_buffer(text, frozenset()), np.uint32)
        except ValueError as error:
            raise _refused(error) from error

    def __getstate__(self) -> str:
        return self._name

    def __setstate__(self, name: str) -> None:
        self.__init__(name)  # type: ignore[misc]


def _pieces(text: str) -> Iterable[str]:
    return cut(text) if len(text) > LONG_TEXT else [text]


def _refused(error: ValueError) -> RunError:
    return RunError.of(
        f"tiktoken cannot part the words of this text ({error})",
        hint="it holds a very long run of white space; shorten it",
    )


def _by_name(name: str) -> tiktoken.Encoding:
    choices = ", ".join(tiktoken.list_encoding_names())
    if name not in tiktoken.list_encoding_names():
        hint = f"give one of {choices}, or the path of a .tiktoken file"
        raise ConfigError.of(
            "there is no such file, nor an encoding of this name", key="vocab_file", value=name, hint=hint
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network raises
        raise ConfigError.of(
            f"the ranks of this encoding cannot be fetched ({type(error).__name__})",
            key="vocab_file",
            value=name,
            hint=f"fetch {name}.tiktoken elsewhere and give its path, or set TIKTOKEN_CACHE_DIR",
        ) from error


def _from_file(path: Path) -> tiktoken.Encoding:
    ranks = _read_ranks(path)
    known = _KNOWN.get(len(ranks))
    if known is None:
        raise ConfigError.of(
            f"a vocabulary of {len(ranks):,} ranks is not known, and the file does not say how words are parted",
            key="vocab_file",
            value=str(path),
            hint=f"give a file of {', '.join(f'{count:,}' for count in _KNOWN)} ranks, or a tokenizer.json",
        )
    return tiktoken.Encoding(path.stem, pat_str=known.words, mergeable_ranks=ranks, special_tokens=known.special)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    try:
        for line in filter(None, path.read_bytes().splitlines()):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise ConfigError.of(
            f"line {len(ranks) + 1} is not a token in base 64 and its rank",
            key="vocab_file",
            value=str(path),
            hint="give a .tiktoken file, or fetch it again",
        ) from error
    except OSError as error:
        raise ConfigError.of(f"cannot read the ranks ({error.strerror})", key="vocab_file", value=str(path)) from error
    return ranks
