"""How the classes of transformers split a text where a folder has vocab.json and merges.txt, and no tokenizer.json.

The two files say nothing of the normalizer and of the pattern that splits a text before merges; these belong to the
class, which tokenizer_config.json names, or else the model's type.

Source: transformers 5.23, models/auto/tokenization_auto.py (TOKENIZER_MAPPING_NAMES) and the classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from megatron.errors import ConfigError
from megatron.tokenizer_info import QWEN2, QWEN3_5
from megatron.tokenizers.tokenizer_config import CONFIG, FILE_CLASS, MODEL

PATTERNS = {"Qwen2Tokenizer": QWEN2, "Qwen3_5Tokenizer": QWEN3_5}
"""Class -> its pattern; its normalizer is NFC."""
_AS_GPT2 = frozenset(
    {
        *("GPT2Tokenizer", "CodeGenTokenizer", "RobertaTokenizer", "BartTokenizer", "LongformerTokenizer"),
        *("LEDTokenizer", "MvpTokenizer", "BlenderbotTokenizer", "HFGPT2Tokenizer", "None"),
        *("TokenizersBackend", FILE_CLASS.removesuffix("Fast")),
    }
)
"""Classes that split a text as GPT-2 does, and those that say nothing of it."""


def splits_as_gpt2(folder: Path) -> bool:
    """Returns whether the class of a folder's tokenizer is of GPT-2's kind."""
    return class_of(folder / CONFIG, folder / MODEL) in _AS_GPT2


def class_of(config: Path | None, model: Path | None) -> str:
    """Returns the class of a tokenizer of two files, without "Fast"; "None" where nothing names it.

    Args:
        config: Its tokenizer_config.json, if any.
        model: The config.json of its model, if any.
    """
    named = _object(config).get("tokenizer_class")
    if named is None:
        named = _class_of_model(str(_object(model).get("model_type")))
    return str(named).removesuffix("Fast")


def split_by_class(made: FastTokenizer, name: str, where: str) -> None:
    """Gives a tokenizer that splits as GPT-2's the normalizer and the pattern of a class.

    Raises ConfigError for a class whose pattern is not known here.

    Args:
        made: The tokenizer; its pre-tokenizer is a ByteLevel.
        name: The class, as `class_of` returns it.
        where: The folder or public name, for the message.
    """
    if name in _AS_GPT2:
        return
    if name not in PATTERNS:
        raise ConfigError.of(
            f"{name} splits texts by a pattern of its own, which vocab.json and merges.txt do not hold",
            key="vocab_file",
            value=where,
            hint="write a tokenizer.json: transformers' AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERNS[name]), behavior="isolated")
    levels = pre_tokenizers.ByteLevel(add_prefix_space=made.pre_tokenizer.add_prefix_space, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, levels])


def _class_of_model(kind: str) -> str | None:
    if kind.startswith(("qwen3_5", "qwen4")):
        return "Qwen3_5Tokenizer"
    return "Qwen2Tokenizer" if kind.startswith(("qwen2", "qwen3")) else None


def _object(path: Path | None) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        found: Any = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
