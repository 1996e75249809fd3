"""The corpora that `prepare_data.py` makes itself; those that it fetches are in public.py.

A corpus is prepared into a folder: `train.jsonl` and `valid.jsonl` with a document a line, and `about.json`, which is
written last and says that the folder is complete. A new corpus is one module with a `prepare(folder)` and a line here.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from megatron.atomic import atomic_writer, write_atomic
from megatron.data.corpora.public import PUBLIC_CORPORA, PublicCorpus
from megatron.errors import ConfigError
from megatron.registry import nearest_name

ABOUT = "about.json"


@dataclass(frozen=True)
class About:
    """What a prepared folder holds."""

    corpus: str
    """Name of the corpus."""
    source: str
    """What it was made of, so that an older folder is recognised."""
    train_documents: int
    """Documents of the training file."""
    train_bytes: int
    """UTF-8 bytes of the training texts."""
    valid_documents: int
    """Documents of the held-out file."""
    valid_bytes: int
    """UTF-8 bytes of the held-out texts."""


@dataclass(frozen=True)
class Corpus:
    """A corpus."""

    name: str
    """Name on the command line."""
    doc: str
    """One line about it."""
    target: str
    """`module:function`, which takes the folder and returns an About. source: see About."""

    def prepare(self, folder: Path) -> About:
        """Writes the corpus into the folder. Raises ConfigError or RunError when its source cannot be had."""
        module, _, function = self.target.partition(":")
        made: Callable[[Path], About] = getattr(importlib.import_module(module), function)
        return made(folder)


CORPORA: Mapping[str, Corpus] = MappingProxyType(
    {
        corpus.name: corpus
        for corpus in [
            Corpus(
                "python_stdlib",
                "source text and help topics of the running Python's standard library; needs no network",
                "megatron.data.corpora.python_stdlib:prepare",
            )
        ]
    }
)


def find_corpus(name: str) -> Corpus | PublicCorpus:
    """The corpus of that name, in any case. Raises ConfigError, with the nearest name, when there is none."""
    known: dict[str, Corpus | PublicCorpus] = {**CORPORA, **PUBLIC_CORPORA}
    if name.lower() in known:
        return known[name.lower()]
    close = nearest_name(name, known)
    choices = f"the corpora are {', '.join(known)}"
    hint = f"did you mean {close}? {choices[0].upper()}{choices[1:]}" if close else choices
    raise ConfigError.of("there is no corpus of this name", key="dataset", value=name, hint=hint)


def read_about(folder: Path) -> About | None:
    """What a complete folder says about itself, or None."""
    try:
        return About(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_about(folder: Path, about: About) -> None:
    """Declares the folder complete."""
    write_atomic(folder / ABOUT, json.dumps(asdict(about), indent=1) + "\n")


def write_jsonl(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """One JSON object a line."""
    write_texts(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Writes a text file that appears under its name only when complete."""
    with atomic_writer(path) as file:
        file.writelines(text.encode("utf-8") for text in texts)
