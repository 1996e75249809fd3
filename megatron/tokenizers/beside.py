"""What tokenizer_config.json says beside a tokenizer's own file, as `transformers` reads it.

Source: transformers 5.23, tokenization_utils_base.py and tokenization_utils_tokenizers.py: named tokens are special
whatever the tokenizer's file calls them, and `add_bos_token` counts only where there is no tokenizer.json, whose
post-processor says it otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "tokenizer_config.json"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_LLAMA = "LlamaTokenizer"
# The begin and end tokens that a class has where the file names none.
_DEFAULTS = {
    _LLAMA: ("<s>", "</s>"),
    "CodeLlamaTokenizer": ("<s>", "</s>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"),
}


@dataclass(frozen=True)
class Beside:
    """What the file says, with the defaults of the class that it names.

    special: the texts of special tokens, in the file's order. begin, end: the tokens that begin and end a text.
    adds_begin: whether a tokenizer without a post-processor of its own puts it before a text. blank: how LLaMA's class
    puts a blank before a text ("first": before its very first word only), None for other classes.
    """

    special: tuple[str, ...] = ()
    begin: str | None = None
    end: str | None = None
    adds_begin: bool = False
    blank: str | None = None


def read_beside(file: str | Path | None) -> Beside:
    """What stands beside a tokenizer's file, or in a tokenizer_config.json; nothing where there is none."""
    if file is None:
        return Beside()
    path = Path(file)
    path = path if path.name == CONFIG else path.with_name(CONFIG)
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Beside()
    if not isinstance(found, dict):
        return Beside()
    begin, end = _DEFAULTS.get(_class(found), (None, None))
    return Beside(
        special=tuple(dict.fromkeys(_special(found))),
        begin=token_text(found.get("bos_token", begin)),
        end=token_text(found.get("eos_token", end)),
        adds_begin=found.get("add_bos_token") is True,
        blank=_blank(found),
    )


def token_text(told: Any) -> str | None:
    """A token, which stands as its text or as an object that holds it."""
    told = told.get("content") if isinstance(told, Mapping) else told
    return told if isinstance(told, str) and told else None


def _special(found: Mapping[str, Any]) -> Iterator[str]:
    told = [found.get(name) for name in _NAMES]
    for name in _LISTS:
        listed = found.get(name)
        told += listed if isinstance(listed, list) else listed.values() if isinstance(listed, Mapping) else ()
    added = found.get("added_tokens_decoder")
    if isinstance(added, Mapping):
        told += [token for token in added.values() if isinstance(token, Mapping) and token.get("special")]
    return (text for text in map(token_text, told) if text is not None)


def _class(found: Mapping[str, Any]) -> str:
    """The tokenizer's class; both of a pair, of which one is called fast, are the same by now."""
    return str(found.get("tokenizer_class")).removesuffix("Fast")


def _blank(found: Mapping[str, Any]) -> str | None:
    if _class(found) != _LLAMA:
        return None
    if found.get("add_prefix_space") is False:
        return "never"
    return "always" if found.get("legacy") is True else "first"
