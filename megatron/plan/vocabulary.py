"""The padded size of the vocabulary, from the configuration or the tokenizer's file, without loading a tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.derived.vocabulary import padded_vocab_size
from megatron.config.schema.tokenizer import TokenizerSection
from megatron.registry import TOKENIZERS, load_target


@dataclass(frozen=True)
class Vocabulary:
    """Padded size of a vocabulary."""

    padded: int | None
    """Rows of the embedding [tokens]; None if not known."""
    source: str
    """Source of the size, or the reason why it is not known."""


def find_vocabulary(section: TokenizerSection, model_parallel_size: int) -> Vocabulary:
    """Finds the vocabulary size, padded to a multiple of make_vocab_size_divisible_by x model_parallel_size."""
    if section.padded_vocab_size is not None:
        return Vocabulary(section.padded_vocab_size, "padded_vocab_size")
    size, source = _from_tokenizer(section)
    if size is None and section.vocab_size is not None:
        size, source = section.vocab_size, "vocab_size"
    if size is None:
        return Vocabulary(None, source)
    padded = padded_vocab_size(size, section.make_vocab_size_divisible_by, model_parallel_size)
    return Vocabulary(padded, f"{source}: {size:,} tokens")


def _from_tokenizer(section: TokenizerSection) -> tuple[int | None, str]:
    entry = TOKENIZERS.entry(section.tokenizer_type)
    if isinstance(entry.vocab_size, int):
        return entry.vocab_size, entry.name
    if section.vocab_file is None:
        return None, "the size of the vocabulary is not known: give vocab_file or vocab_size"
    path = Path(section.vocab_file)
    try:
        text = path.read_text(encoding="utf-8")
        if entry.vocab_size is not None:
            return int(load_target(entry.vocab_size)(_parsed(text))), str(path)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError):
        return None, f"the size of the vocabulary is not known: {path} cannot be read; give vocab_size"
    return (
        None,
        f"the size of the vocabulary is not known: {section.tokenizer_type} finds it at launch; give vocab_size",
    )


def _parsed(text: str) -> Any:
    """Returns the value of a JSON file, or the text of another one."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def vocab_txt_size(content: str) -> int:
    """Returns the number of ids of a vocab.txt, which has a token a line."""
    return len(content.removesuffix("\n").split("\n"))


def vocab_json_size(content: Any) -> int:
    """Returns the number of ids of a vocab.json, which maps tokens to ids."""
    return len(content)


def tokenizer_json_size(content: Any) -> int:
    """Returns the number of ids of a tokenizer.json: the model's and the added ones; gaps need rows as well."""
    vocabulary = content["model"]["vocab"]
    ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    ids |= {token["id"] for token in content.get("added_tokens", ())}
    return max(len(ids), max(ids) + 1)
