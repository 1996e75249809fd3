"""Two folders of `transformers` that are one model: an encoder of questions and one of passages.

`load` reads a folder that holds both as it reads one folder of another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron.checkpoint.huggingface import model_folder
from megatron.checkpoint.huggingface.dpr import QUESTIONS
from megatron.checkpoint.huggingface.family import Settings
from megatron.checkpoint.huggingface.model_folder import CONFIG, Folder
from megatron.errors import ConfigError, ConfigIssue

PAIR = ("question_encoder", "context_encoder")
"""Names of both folders in one."""


def is_pair(path: Path) -> bool:
    """Returns whether a folder holds both encoders."""
    return not (path / CONFIG).exists() and all(model_folder.is_folder(path / name) for name in PAIR)


def is_folder(path: Path) -> bool:
    """Returns whether a path is the folder of a model, or one that holds both encoders of a model."""
    return model_folder.is_folder(path) or is_pair(path)


def open_folder(path: Path) -> Folder:
    """Returns the model of such a folder. Raises ConfigError for another one."""
    return open_pair(*(path / name for name in PAIR)) if is_pair(path) else Folder.open(path)


def open_pair(questions: Path, passages: Path) -> Folder:
    """Returns both encoders as one model.

    Raises ConfigError unless one is an encoder of questions and the other one of passages, and both of one size.

    Args:
        questions: folder of the encoder of questions.
        passages: folder of the encoder of passages.
    """
    first, second = Folder.open(questions), Folder.open(passages)
    ConfigError.raise_any(_classes(first, second))
    ConfigError.raise_any(_sizes(first, second))
    return replace(first, passages=second)


def missing_keys(folder: Folder, *, shared: bool) -> Settings:
    """Returns keys of the model that config.json leaves open.

    Raises ConfigError for one encoder of two, unless it is to read queries and passages, and where that is asked of
    another model.

    Args:
        folder: the model.
        shared: whether one encoder reads queries and passages.
    """
    encodes = folder.family.model_type == QUESTIONS.model_type
    location = str(folder.path)
    if shared and (not encodes or folder.passages is not None):
        what = f"one encoder for queries and passages is a folder of model_type {QUESTIONS.model_type}"
        raise ConfigError.of(what, location=location, hint="leave --shared-encoder out")
    if encodes and not shared and folder.passages is None:
        what = f"this is the {folder.family.architecture} of a model of two encoders"
        hint = "give the encoder of questions by --input-dir and that of passages by --passage-dir, or --shared-encoder"
        raise ConfigError.of(what, location=location, hint=f"{hint} for queries and passages alike")
    return {"retrieval_shared_encoder": True} if shared else {}


def _classes(first: Folder, second: Folder) -> Iterator[ConfigIssue]:
    """Folders of another class than the one that belongs in their place."""
    for folder, family, texts in ((first, QUESTIONS, "questions"), (second, QUESTIONS.passages, "passages")):
        if family is not None and folder.family is not family:
            what = f"the encoder of {texts} is a {family.architecture}, and this is a {folder.family.architecture}"
            yield ConfigIssue(what, location=str(folder.path / CONFIG))


def _sizes(first: Folder, second: Folder) -> Iterator[ConfigIssue]:
    """Keys in which the two differ, of which a model has one."""
    one, other = ({**each.settings(), "vocab_size": each.rows} for each in (first, second))
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            what = f"that of the encoder of questions is {one.get(key)}, and a model has one for both"
            yield ConfigIssue(what, key=key, value=other.get(key), location=str(second.path / CONFIG))
