"""The model that adapters are trained beside: what of it an adapter alone can be put on.

A run that starts from a model keeps the number of its tokens with every checkpoint, and so does each run that continues
from one of these. Rows that were added to the base's, and that nothing trains, are in no adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.adapter_config import EMBEDDING, HEAD, SAVED, low_rank, soft_prompt
from megatron.checkpoint.format import files, layout
from megatron.checkpoint.huggingface.encoder_pair import is_folder, open_folder
from megatron.checkpoint.huggingface.generation_config import facts_of_tokenizer

FACT = "adapter_base"
"""Its name among what a checkpoint says of its run."""


@dataclass(frozen=True)
class AdapterBase:
    """A base model, as far as checkpoints of adapters beside it have to know it."""

    tokens: int | None
    """Rows of its embedding that are tokens, as an export of it has them; None where that is not known [tokens]."""
    trained: tuple[str, ...] = ()
    """Names of `modules_to_save` that these runs have trained, so that they are not those of the base."""

    def as_json(self) -> dict[str, Any]:
        """The fact for a checkpoint."""
        return {"tokens": self.tokens, "trained": list(self.trained)}

    def with_trained(self, names: frozenset[str]) -> AdapterBase:
        """The base of a run that trains these beside adapters."""
        return AdapterBase(self.tokens, tuple(name for name in SAVED if name in names.union(self.trained)))


def tokens_of(directory: Path, rows: int) -> int:
    """Rows of a stored embedding that are tokens; `rows` where the checkpoint does not say it [tokens].

    Args:
        directory: A checkpoint or a folder of transformers, all of whose rows count.
        rows: Rows of the stored embedding, padding included [tokens].
    """
    if is_folder(directory):
        return rows
    sizes = (facts_of_tokenizer(directory).get("vocab_size"), _configuration(directory).get("vocab_size"))
    return max((size for size in sizes if size is not None and size <= rows), default=rows)


def declared_tokens(directory: Path, rows: int) -> int | None:
    """Tokens that a model has by its own word, whatever its tokenizer has; None where it says nothing [tokens].

    Args:
        directory: A checkpoint or a folder of transformers, all of whose rows count.
        rows: Rows of the stored embedding, padding included [tokens].
    """
    if is_folder(directory):
        return rows
    size = _configuration(directory).get("vocab_size")
    return size if isinstance(size, int) and size <= rows else None


def base_of_checkpoint(directory: Path, rows: int) -> AdapterBase:
    """The base of adapters that are trained on from a checkpoint: itself, or that of the adapters in it.

    Args:
        directory: A checkpoint or a folder of transformers.
        rows: Rows of the stored embedding, padding included [tokens].
    """
    if is_folder(directory):
        return AdapterBase(open_folder(directory).rows)
    stored = stored_base(directory)
    if stored is not None:
        return stored
    settings = _configuration(directory)
    adapter = low_rank(settings.get("lora"))
    if adapter is not None:
        return AdapterBase(None).with_trained(adapter.trained(tied=not settings.get("no_weight_tying")))
    if soft_prompt(settings.get("soft_prompt_tuning")) is not None:
        return AdapterBase(None)
    return AdapterBase(tokens_of(directory, rows))


def stored_base(directory: Path) -> AdapterBase | None:
    """What a checkpoint says of the base of its adapters; None where it says nothing."""
    path = directory / layout.RUN
    fact = files.read_json(path).get(FACT) if path.is_file() else None
    return AdapterBase(fact.get("tokens"), tuple(fact.get("trained", ()))) if isinstance(fact, dict) else None


def frozen_rows(trained: frozenset[str], *, tied: bool) -> list[str]:
    """What has a row for each token and is not trained: "embedding", "output layer". trained: of modules_to_save."""
    names = {EMBEDDING: "embedding"} if tied else {EMBEDDING: "embedding", HEAD: "output layer"}
    return [spelt for name, spelt in names.items() if name not in trained]


def _configuration(directory: Path) -> Mapping[str, Any]:
    """The keys of the run that wrote a checkpoint; none where they are not there."""
    path = directory / layout.RESOLVED
    found = files.read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else {}
