"""What the classes of transformers know of a tokenizer and its files do not say, where there is no tokenizer.json.

vocab.json and merges.txt say nothing of the normalizer and of the pattern that splits a text before merges, and a
sentencepiece model of T5 nothing of its sentinels. These belong to the class, which tokenizer_config.json names, or
else the model's type.

Source: transformers 5.23, models/auto/tokenization_auto.py (TOKENIZER_MAPPING_NAMES) and the classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from megatron.errors import ConfigError
from megatron.tokenizer_info import QWEN2, QWEN3_5
from megatron.tokenizers.tokenizer_config import CONFIG, FILE_CLASS, MODEL, TOKENIZER, read_object

PATTERNS = {"Qwen2Tokenizer": QWEN2, "Qwen3_5Tokenizer": QWEN3_5}
"""Class -> its pattern; its normalizer is NFC."""
_AS_ROBERTA = frozenset({"RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer", "MvpTokenizer"})
"""Classes that put <s> before a text, and </s> behind it."""
_OF_FILES = frozenset({FILE_CLASS.removesuffix("Fast"), "TokenizersBackend", "None"})
_AS_GPT2 = _AS_ROBERTA | _OF_FILES | {"GPT2Tokenizer", "CodeGenTokenizer"}
"""Classes that split a text as GPT-2 does, and those that say nothing of it."""
T5 = "T5Tokenizer"
_SENTINELS = 100  # of T5's class, where extra_ids is left out


def splits_as_gpt2(folder: Path) -> bool:
    """Returns whether the class of a folder's tokenizer is of GPT-2's kind."""
    return class_of(folder / CONFIG, folder / MODEL) in _AS_GPT2


def class_of(config: Path | None, model: Path | None) -> str:
    """Returns the class of a tokenizer of two files, without "Fast"; "None" where nothing names it.

    Args:
        config: Its tokenizer_config.json, if any.
        model: The config.json of its model, if any.
    """
    named = read_object(config).get("tokenizer_class")
    if named is None:
        named = _class_of_model(str(read_object(model).get("model_type")))
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


def sentinels_of(folder: Path, size: int) -> dict[str, int]:
    """Returns the sentinels that T5's class puts behind a sentencepiece model, and their ids; none of other classes.

    The last of them is the first row behind the model's.

    Args:
        folder: Of the tokenizer.
        size: Pieces of the sentencepiece model [tokens].
    """
    if class_of(folder / CONFIG, folder / MODEL) != T5:
        return {}
    count = read_object(folder / CONFIG).get("extra_ids", _SENTINELS)
    return {f"<extra_id_{number}>": size + count - 1 - number for number in reversed(range(int(count)))}


def post_processor_of(made: FastTokenizer, name: str, named: Mapping[str, str]) -> processors.PostProcessor | None:
    """Returns what a class puts around a text, or None where its files say it.

    Args:
        made: The tokenizer.
        name: The class, as `class_of` returns it.
        named: cls_token and the like -> the token, as far as files name them.
    """
    first, last = named.get("cls_token", "<s>"), named.get("sep_token", "</s>")
    end = named.get("eos_token", "</s>")
    found = {token: made.token_to_id(token) for token in (first, last, end)}
    ids = {token: number for token, number in found.items() if number is not None}
    if name == T5 and end in ids:
        pieces = {"single": ["$A", end], "pair": ["$A", end, "$B", end]}
        return processors.TemplateProcessing(**pieces, special_tokens=[(end, ids[end])])
    if name in _AS_ROBERTA and first in ids and last in ids:
        blank = made.pre_tokenizer.add_prefix_space
        return processors.RobertaProcessing((last, ids[last]), (first, ids[first]), add_prefix_space=blank)
    return None


def retain_class(model: Path, target: Path) -> None:
    """Names the class in a copy of a tokenizer's files where only the type of its model says it.

    Args:
        model: Folder of the model, with its config.json.
        target: Folder of the copy.
    """
    settings, kind = read_object(target / CONFIG), str(read_object(model / MODEL).get("model_type"))
    name = _class_of_model(kind)
    if name is not None and not settings.get("tokenizer_class") and not (target / TOKENIZER).is_file():
        text = json.dumps({**settings, "tokenizer_class": name}, ensure_ascii=False, indent=1)
        (target / CONFIG).write_text(text, encoding="utf-8")


def _class_of_model(kind: str) -> str | None:
    if kind in ("t5", "mt5", "roberta"):
        return "RobertaTokenizer" if kind == "roberta" else T5
    if kind.startswith(("qwen3_5", "qwen4")):
        return "Qwen3_5Tokenizer"
    return "Qwen2Tokenizer" if kind.startswith(("qwen2", "qwen3")) else None
