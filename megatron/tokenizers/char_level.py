"""CharLevelTokenizer: one token a UTF-8 byte, so that it needs no file and knows every text.

There are 512 ids, the size that public checkpoints of this kind have. Id 0 ends a document; a NUL byte that is in
a text is written as id 256, so that no text can end a document. Bytes 1 to 255 are their own ids; 257 to 511 are
unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

_END_OF_DOCUMENT = 0
_NUL_BYTE = 256
_VOCABULARY = 512


class CharLevelTokenizer:
    """Bytes as tokens. Takes the arguments that every tokenizer takes and needs none of them."""

    vocab_size = _VOCABULARY
    eod = begin = _END_OF_DOCUMENT
    lossless = True
    engine = "bytes"
    special_tokens: Mapping[str, int] = MappingProxyType({})  # the end of a document has no spelling
    prefix_ids: tuple[int, ...] = ()

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        """The bytes of the text, a NUL byte as 256."""
        encoded = text.encode("utf-8")
        if 0 in encoded:
            return [byte or _NUL_BYTE for byte in encoded]
        return list(encoded)

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The same: no text spells a special token."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The bytes of each text as arrays [tokens]."""
        arrays = []
        for text in texts:
            array = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)
            array[array == 0] = _NUL_BYTE
            arrays.append(array)
        return arrays

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; what is not UTF-8 (a sample may be cut anywhere) becomes U+FFFD."""
        found = bytearray()
        for token in ids:
            if 0 < token < _NUL_BYTE:
                found.append(token)
            elif token == _NUL_BYTE:
                found.append(0)
        return found.decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes | None:
        """The byte; None of ids that stand for none."""
        return bytes([token % _NUL_BYTE]) if 0 < token <= _NUL_BYTE else None
