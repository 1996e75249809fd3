"""A tokenizer of ours as files that other programs read, and the ids of the tokens that begin and end a text.

What is a tokenizer.json on the disk stays as it is, byte by byte, where the run reads what it says; LLaMA's class makes
another one of some. Others are written as one, with the class PreTrainedTokenizerFast, under which every release of
`transformers` reads that file and nothing else. A sentencepiece model is written beside its tokenizer.json, or alone
where none gives the same ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError
from megatron.tokenizer_info import TokenizerInfo, describe_tokenizer
from megatron.tokenizers.added_tokens import ADDED
from megatron.tokenizers.base import END_OF_DOCUMENT, Tokenizer
from megatron.tokenizers.builder import make_tokenizer
from megatron.tokenizers.fast import FromTokenizers
from megatron.tokenizers.from_folder import CONFIG, TOKENIZER, find_tokenizer, lost_tokens, named_tokens
from megatron.tokenizers.pretrained import files_of
from megatron.tokenizers.sentence_piece import SPMTokenizer
from megatron.tokenizers.sentence_piece_json import as_tokenizer_json, text_read_otherwise
from megatron.tokenizers.tokenizer_config import FILE_CLASS

_OF_FOLDERS = frozenset({"PretrainedFromHF", "HFTokenizer"})


@dataclass(frozen=True)
class Portable:
    """What there is to write."""

    vocab_size: int
    """[tokens]."""
    end: int
    """Ids; begin is None where the tokenizer has none."""
    begin: int | None
    """Ids; begin is None where the tokenizer has none."""
    folder: Path | None
    """One of a model, whose files are to be copied, or None."""
    content: str | None
    """The text of the tokenizer.json, or None."""
    model: Path | None
    """A .model to copy."""
    names: dict[str, Any]
    """For tokenizer_config.json."""
    other: bool = False
    """The run reads another tokenizer.json than the folder's own, which is content."""
    pad: int | None = None
    """Id of padding, where the tokenizer names it."""
    otherwise: str | None = None
    """A text of which other programs read other ids."""
    lost: str = ""
    """A line about tokens beside the .model that the run reads as text, or ""."""
    info: TokenizerInfo | None = None
    """Its identity."""

    @property
    def readable(self) -> bool:
        """Whether any other program can read what is written."""
        return self.content is not None or self.model is not None

    def write(self, output: Path, length: int | None) -> None:
        """Adds what the folder does not hold yet. length: the longest text of the model [tokens]."""
        if self.content is not None and self.other:
            (output / TOKENIZER).write_text(self.content, encoding="utf-8")
        elif self.content is not None and not (output / TOKENIZER).exists():
            (output / TOKENIZER).write_text(self.content, encoding="utf-8")
            self._complete(output / CONFIG)
        if self.model is not None:
            (output / "tokenizer.model").write_bytes(self.model.read_bytes())
            added = self.model.with_name(ADDED)
            if added.is_file() and not (output / ADDED).exists():
                (output / ADDED).write_bytes(added.read_bytes())
        if self.readable and not (output / CONFIG).exists():
            kind = "LlamaTokenizer" if self.content is None else FILE_CLASS
            settings = {"tokenizer_class": kind, "model_max_length": length, **self.names}
            (output / CONFIG).write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")

    def _complete(self, path: Path) -> None:
        """Add what a class read from other files than tokenizer.json, and LLaMA's implicit begin token."""
        if not path.is_file():
            return
        settings = {**self.names, **json.loads(path.read_text(encoding="utf-8"))}
        if str(settings.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer":
            settings.setdefault("add_bos_token", True)
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")


def portable(kind: str, vocab_file: str | None, merge_file: str | None) -> Portable:
    """The tokenizer of a configuration. Raises ConfigError where it cannot be built."""
    tokenizer = make_tokenizer(kind, vocab_file=vocab_file, merge_file=merge_file)
    made = _portable(tokenizer, kind, vocab_file)
    return replace(made, info=describe_tokenizer(kind, tokenizer))


def _portable(tokenizer: Tokenizer, kind: str, vocab_file: str | None) -> Portable:
    if isinstance(tokenizer, SPMTokenizer):
        return _of_sentence_piece(tokenizer, Path(vocab_file or ""))
    if not isinstance(tokenizer, FromTokenizers):
        return Portable(tokenizer.vocab_size, tokenizer.eod, None, None, None, None, {})
    folder = file = None
    if kind in _OF_FOLDERS:
        found = files_of(str(vocab_file))
        folder = next(iter(found.values())).parent
        if TOKENIZER in found:
            file = found[TOKENIZER].read_text(encoding="utf-8")
        folder = folder if (folder / CONFIG).is_file() else None
    content = tokenizer.to_json(file)
    made = _of_tokenizers(tokenizer, folder, content)
    return replace(made, other=file is not None and content != file)


def portable_of(path: Path) -> Portable:
    """The tokenizer of a file or folder. Raises ConfigError where there is none that is understood."""
    files: dict[str, str] = {"vocab_file": str(path)}
    if path.is_dir():
        found = find_tokenizer(path)
        if not found.keys:
            raise ConfigError.of(found.reason, key="tokenizer", value=str(path), hint="give a tokenizer.json")
        files = dict(found.keys)
        return portable(files["tokenizer_type"], files["vocab_file"], files.get("merge_file"))
    if not path.is_file():
        raise ConfigError.of("there is no such file", key="tokenizer", value=str(path))
    if path.suffix == ".model":
        return portable("SPMTokenizer", str(path), None)
    merges = next((each for name in ("merges.txt", "vocab.bpe") if (each := path.with_name(name)).is_file()), None)
    if merges is not None and not _is_complete(path):
        return portable("GPT2BPETokenizer", str(path), str(merges))
    return portable("PretrainedFromHF", str(path), None)


def _is_complete(path: Path) -> bool:
    """Whether it is a tokenizer.json and no vocab.json, which may have a token called model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # reading it reports what is wrong
    return isinstance(content, dict) and isinstance(content.get("model"), dict)


def _of_tokenizers(tokenizer: FromTokenizers, folder: Path | None, content: str) -> Portable:
    end = tokenizer.end
    named = named_tokens(folder) if folder is not None else {}
    names: dict[str, Any] = {"eos_token": end}
    if end == END_OF_DOCUMENT:  # GPT-2's, which begins texts too and stands for what is unknown
        names |= {"bos_token": end, "unk_token": end}
    names |= tokenizer.roles
    names |= {"split_special_tokens": True} if tokenizer.splits_special else {}
    begin = named.get("bos_token", names.get("bos_token") if folder is None else None)
    number = None if begin is None else tokenizer.id_of(begin)
    padding = named.get("pad_token", names.get("pad_token"))
    pad = None if padding is None else tokenizer.id_of(padding)
    return Portable(tokenizer.vocab_size, tokenizer.eod, number, folder, content, None, names, pad=pad)


def _of_sentence_piece(tokenizer: SPMTokenizer, path: Path) -> Portable:
    folder = path.parent if (path.parent / CONFIG).is_file() else None
    begin = tokenizer.own_begin
    names: dict[str, Any] = {
        "eos_token": tokenizer.piece(tokenizer.eod),
        "unk_token": tokenizer.piece(tokenizer.unknown),
    }
    names |= {} if begin is None else {"bos_token": tokenizer.piece(begin)}
    names |= {"split_special_tokens": True} if tokenizer.splits_special else {}
    content = as_tokenizer_json(tokenizer, path)
    otherwise = None if content is None else text_read_otherwise(content, tokenizer, path)
    lost = lost_tokens(path.parent, tokenizer)
    return Portable(
        tokenizer.vocab_size, tokenizer.eod, begin, folder, content, path, names, otherwise=otherwise, lost=lost
    )
