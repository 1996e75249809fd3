"""A tokenizer of the `tokenizers` library that gives no text the ids of special tokens.

`Tokenizer.encode_special_tokens` keeps the library from splitting a text at special tokens. The model may find them all
the same, where they are in its own vocabulary: Unigram by their scores, WordLevel, WordPiece and BPE with
`ignore_merges` where the pre-tokenizer leaves them whole. In the copy that is made here they have names that no text
spells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_UNSPELT = "\U0010fffe{}\U0010ffff"
"""Name of a hidden token: characters that Unicode keeps out of text, around its id."""


def without_special_tokens(tokenizer: FastTokenizer, special: Mapping[str, int]) -> FastTokenizer:
    """Returns the tokenizer where no text that spells a special token gets its id, else a copy of which that is so.

    Args:
        tokenizer: The library's tokenizer, which does not split texts at special tokens.
        special: Text and id of each special token.
    """
    if not special_ids(tokenizer, special):
        return tokenizer
    content = json.loads(tokenizer.to_str())
    hidden = {text: _UNSPELT.format(number) for text, number in special.items() if text != _unknown(content["model"])}
    content["model"]["vocab"] = _renamed(content["model"]["vocab"], hidden)
    for token in content["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    try:
        made = FastTokenizer.from_str(json.dumps(content))
    except Exception:  # noqa: BLE001  the library raises nothing narrower; merges name a hidden token
        return tokenizer
    made.encode_special_tokens = True
    return made


def special_ids(tokenizer: FastTokenizer, special: Mapping[str, int]) -> frozenset[int]:
    """Returns the ids of special tokens that texts get which spell them; that of unknown text is not among them."""
    unknown = special.get(_unknown(json.loads(tokenizer.to_str())["model"]) or "")
    texts = [(text, number) for text, number in special.items() if number != unknown]
    found = tokenizer.encode_batch([one for text, _ in texts for one in _around(text)], add_special_tokens=False)
    each = len(list(_around("")))
    return frozenset(
        number
        for index, (_, number) in enumerate(texts)
        if any(number in encoded.ids for encoded in found[index * each : (index + 1) * each])
    )


def _around(text: str) -> Iterator[str]:
    yield from (text, f" {text} ", f"a{text}b", f"a {text} b", f"{text}{text}")


def _unknown(model: Mapping[str, Any]) -> str | None:
    """Returns the text of the token for unknown text."""
    if model["type"] == "Unigram":
        number = model.get("unk_id")
        return None if number is None else str(model["vocab"][number][0])
    found: str | None = model.get("unk_token")
    return found


def _renamed(vocabulary: Any, names: Mapping[str, str]) -> Any:
    if isinstance(vocabulary, dict):
        return {names.get(text, text): number for text, number in vocabulary.items()}
    return [[names.get(text, text), score] for text, score in vocabulary]
