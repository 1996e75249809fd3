"""PretrainedFromHF and HFGPT2Tokenizer: the tokenizer of a pretrained model, from a folder or by its public name.

A folder holds tokenizer.json, or vocab.json and merges.txt, and the tokens that it adds to them (added_tokens.py). What
is no folder is the name of a model on the Hugging Face hub, whose files are fetched once into its cache;
HF_HUB_OFFLINE=1 keeps to what is there. The end of a document is the model's end-of-text token, which
tokenizer_config.json names.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from megatron.errors import ConfigError
from megatron.tokenizers.added_tokens import ADDED, add_tokens
from megatron.tokenizers.base import END_OF_DOCUMENT
from megatron.tokenizers.fast import FromTokenizers, parse
from megatron.tokenizers.gpt2 import gpt2_bpe
from megatron.tokenizers.tokenizer_classes import class_of, split_by_class
from megatron.tokenizers.tokenizer_config import CONFIG, MODEL, NAMES, Beside, read_beside

PADDING = "<|padding|>"
_FILES = ("tokenizer.json", CONFIG, ADDED, NAMES, MODEL, "vocab.json", "merges.txt")
_ENDS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[SEP]")


class PretrainedFromHF(FromTokenizers):
    """The tokenizer of a folder or of a public model's name, which is given as vocab_file.

    Raises ConfigError when it cannot be had or its end-of-text token is not known.
    """

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        if vocab_file is None:
            raise ConfigError.of(
                "PretrainedFromHF needs a folder or the name of a public model",
                key="vocab_file",
                value=None,
                hint="give a folder with tokenizer.json, or a name such as EleutherAI/gpt-neox-20b",
            )
        files = files_of(vocab_file)
        tokenizer = _tokenizer_of(files, vocab_file)
        super().__init__(tokenizer, _end_of_text(files, tokenizer, vocab_file), vocab_file, _beside(files))


class HFGPT2Tokenizer(FromTokenizers):
    """The same for GPT-2's kin; the public model gpt2 unless one is named. Adds `<|padding|>` as the last token."""

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        name = vocab_file or "gpt2"
        files = files_of(name)
        tokenizer = _tokenizer_of(files, name)
        tokenizer.add_special_tokens([AddedToken(PADDING, special=True, normalized=False)])
        super().__init__(tokenizer, _end_of_text(files, tokenizer, name), name, _beside(files))


def files_of(name: str, names: Sequence[str] = _FILES) -> dict[str, Path]:
    """Those of the wanted files that a folder or a public model has; a lone file is taken for a tokenizer.json.

    Raises ConfigError when a public model has none of them, or cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        return {file: folder / file for file in names if (folder / file).is_file()}
    if folder.is_file():
        beside = {file: folder.with_name(file) for file in (ADDED, NAMES)}
        found = {file: path for file, path in beside.items() if file in names and path.is_file()}
        return {"tokenizer.json": folder, CONFIG: folder.with_name(CONFIG), **found}
    hub = importlib.import_module("huggingface_hub")
    found = {}
    reasons = []
    for file in names:
        if file in ("vocab.json", "merges.txt") and "tokenizer.json" in found:
            continue  # a tokenizer.json says it all
        try:
            found[file] = Path(hub.hf_hub_download(name, file))
        except Exception as error:  # noqa: BLE001  no network, no such model, no such file: reported below where it matters
            reasons.append(str(error).strip().splitlines()[0])
    if not found:
        raise ConfigError.of(
            f"this is no folder here, and no public model whose tokenizer could be fetched ({reasons[0]})",
            key="vocab_file",
            value=name,
            hint="give a folder that holds the model's tokenizer.json",
        )
    return found


def _beside(files: dict[str, Path]) -> Beside:
    """What tokenizer_config.json says; a tokenizer.json says itself what it puts before a text."""
    beside = read_beside(files.get(CONFIG, files.get(NAMES)))
    return replace(beside, adds_begin=False) if "tokenizer.json" in files else beside


def _tokenizer_of(files: dict[str, Path], name: str) -> FastTokenizer:
    """The tokenizer of the files, with the tokens that they add to the vocabulary."""
    tokenizer = _vocabulary_of(files, name)
    add_tokens(tokenizer, files, name)
    return tokenizer


def _vocabulary_of(files: dict[str, Path], name: str) -> FastTokenizer:
    if "tokenizer.json" in files:
        return parse(_read(files["tokenizer.json"], name), name)
    if {"vocab.json", "merges.txt"} <= files.keys():
        vocabulary, merges = (_read(files[file], name) for file in ("vocab.json", "merges.txt"))
        made = gpt2_bpe(vocabulary, merges, str(files["vocab.json"]), str(files["merges.txt"]))
        split_by_class(made, class_of(files.get(CONFIG), files.get(MODEL)), name)
        return made
    raise ConfigError.of(
        "there is no tokenizer.json, and no vocab.json with merges.txt",
        key="vocab_file",
        value=name,
        hint="write one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
    )


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError.of(f"cannot read {path.name} ({error})", key="vocab_file", value=name) from error


def _end_of_text(files: dict[str, Path], tokenizer: FastTokenizer, name: str) -> str:
    """The token that tokenizer_config.json calls the end of text, else a usual one that the vocabulary has."""
    named = read_beside(files.get(CONFIG, files.get(NAMES))).end
    for token in (named, *_ENDS):
        if token is not None and tokenizer.token_to_id(token) is not None:
            return token
    raise ConfigError.of(
        "it does not say which token ends a text",
        key="vocab_file",
        value=name,
        hint='write {"eos_token": "..."} into tokenizer_config.json beside tokenizer.json',
    )
