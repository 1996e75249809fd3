"""A tokenizer of the `tokenizers` library that gives no text the ids of special tokens.

`Tokenizer.encode_special_tokens` keeps the library from splitting a text at special tokens. The model may find them all
the same, where they are in its own vocabulary: Unigram by their scores, WordLevel, WordPiece and BPE with
`ignore_merges` where the pre-tokenizer leaves them whole. In the copy that is made here they have names that no text
spells.

Names that the tokenizer itself looks up stay: the token of unknown text, the parts of merges, the characters that stand
for blanks and bytes, and with `byte_fallback` the bytes `<0x00>` to `<0xFF>` of characters that the vocabulary lacks.
Texts that spell such a byte are cut within it, so that they are read as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from megatron.tokenizers.byte_level import byte_alphabet

_UNSPELT = "\U0010fffe{}\U0010ffff"
"""Name of a hidden token: characters that Unicode keeps out of text, around its id."""
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_INSIDE_BYTE = {
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""A pre-tokenizer that cuts texts behind the first character of a spelt byte."""


def without_special_tokens(tokenizer: FastTokenizer, special: Mapping[str, int]) -> FastTokenizer:
    """Returns the tokenizer where no text that spells a special token gets its id, else a copy of which that is so.

    Args:
        tokenizer: The library's tokenizer, which does not split texts at special tokens.
        special: Text and id of each special token.
    """
    found, finds_bytes = special_ids(tokenizer, special), _finds_bytes(tokenizer, special)
    if not found and not finds_bytes:
        return tokenizer
    content = json.loads(tokenizer.to_str())
    if found:
        stay = {*_looked_up(content), *_of_merges(content["model"])}
        hidden = {text: _UNSPELT.format(number) for text, number in special.items() if text not in stay}
        content["model"]["vocab"] = _renamed(content["model"]["vocab"], hidden)
        for token in content["added_tokens"]:
            token["content"] = hidden.get(token["content"], token["content"])
    if finds_bytes:
        parts = [part for part in (content["pre_tokenizer"], _INSIDE_BYTE) if part]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    made = FastTokenizer.from_str(json.dumps(content))
    made.encode_special_tokens = True
    return made


def special_ids(tokenizer: FastTokenizer, special: Mapping[str, int]) -> frozenset[int]:
    """Returns the ids of special tokens that texts get which spell them; those that it looks up are not among them."""
    stay = _looked_up(json.loads(tokenizer.to_str()))
    return _found(tokenizer, {text: number for text, number in special.items() if text not in stay})


def fallback_bytes(tokenizer: FastTokenizer) -> frozenset[int]:
    """Returns the ids of the tokens by which the model spells, byte for byte, what its vocabulary lacks."""
    ids = frozenset(number for text in _BYTES if (number := tokenizer.model.token_to_id(text)) is not None)
    return ids if ids and json.loads(tokenizer.to_str())["model"].get("byte_fallback") else frozenset()


def with_bytes_as_text(tokenizer: FastTokenizer) -> FastTokenizer:
    """Returns a tokenizer for decoding, which leaves out special tokens, but not bytes that the file calls special."""
    ids, added = fallback_bytes(tokenizer), tokenizer.get_added_tokens_decoder()
    if not any(added[number].special for number in ids & added.keys()):
        return tokenizer
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in ids]
    return FastTokenizer.from_str(json.dumps(content))


def _found(tokenizer: FastTokenizer, special: Mapping[str, int]) -> frozenset[int]:
    found = tokenizer.encode_batch([one for text in special for one in _around(text)], add_special_tokens=False)
    each = len(list(_around("")))
    return frozenset(
        number
        for index, number in enumerate(special.values())
        if any(number in encoded.ids for encoded in found[index * each : (index + 1) * each])
    )


def _finds_bytes(tokenizer: FastTokenizer, special: Mapping[str, int]) -> bool:
    """Whether a text that spells a byte of byte_fallback gets its id, where the byte is a special token."""
    ids = fallback_bytes(tokenizer)
    # Such a text is ASCII, so only the bytes of ASCII can be those of its characters.
    spelt = {text: special[text] for text in _BYTES[128:] if special.get(text) in ids}
    return bool(_found(tokenizer, spelt))


def _around(text: str) -> Iterator[str]:
    yield from (text, f" {text} ", f"a{text}b", f"a {text} b", f"{text}{text}")


def _looked_up(content: Mapping[str, Any]) -> frozenset[str]:
    """Returns names of tokens that texts get which do not spell them."""
    model = content["model"]
    names = {_unknown(model), *_put_in(content["normalizer"]), *_put_in(content["pre_tokenizer"])}
    return frozenset(filter(None, names)) | frozenset(_BYTES if model.get("byte_fallback") else ())


def _unknown(model: Mapping[str, Any]) -> str | None:
    """Returns the text of the token for unknown text."""
    if model["type"] == "Unigram":
        number = model.get("unk_id")
        return None if number is None else str(model["vocab"][number][0])
    found: str | None = model.get("unk_token")
    return found


def _put_in(part: Any) -> Iterable[str]:
    """Returns what a normalizer or pre-tokenizer writes in place of blanks and bytes."""
    written = set[str]()
    pending = [part]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            pending += one.values()
            kind = one.get("type")
            key = {"Metaspace": "replacement", "Prepend": "prepend", "Replace": "content"}.get(str(kind))
            written |= {str(one[key])} if key else set(byte_alphabet()) if kind == "ByteLevel" else set()
        elif isinstance(one, list):
            pending += one
    return written


def _of_merges(model: Mapping[str, Any]) -> Iterator[str]:
    """Returns the tokens that merges name."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges", ()):
        left, right = merge if isinstance(merge, list) else re.split(" ", merge, maxsplit=1)
        yield from (left, right, left + right[len(prefix) :])


def _renamed(vocabulary: Any, names: Mapping[str, str]) -> Any:
    if isinstance(vocabulary, dict):
        return {names.get(text, text): number for text, number in vocabulary.items()}
    return [[names.get(text, text), score] for text, score in vocabulary]
