"""What a run reads, kept with its checkpoints: the order of its samples, its tokenizer, and the base of its adapters.

A resume compares the first two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.load.adapter_base import FACT, AdapterBase
from megatron.errors import ConfigError, ConfigIssue
from megatron.log import get_logger
from megatron.tokenizer_info import TokenizerInfo

_log = get_logger(__name__)

_OVERRIDE_HINT = "set override_data_order to go on in the new order, or give back what the checkpoint's run had"


@dataclass(frozen=True)
class RunInputs:
    """What a checkpoint keeps of what its run reads."""

    tokenizer: TokenizerInfo | None = None
    """The run's tokenizer; None where it is unknown."""
    data: Mapping[str, Any] | None = None
    """Data order of the run, as `order_facts` gives it; None where there is none."""
    base: AdapterBase | None = None
    """The base of its adapters; None for a run without adapters, or from random weights."""

    def as_json(self) -> dict[str, Any]:
        """The facts for a checkpoint."""
        own = self.tokenizer
        stored = None
        if own is not None:
            stored = {"tokenizer_type": own.kind, "vocab_size": own.vocab_size, "eod": own.eod}
            stored["fingerprint"] = own.fingerprint
        facts = {"tokenizer": stored, "data": dict(self.data) if self.data is not None else None}
        return facts if self.base is None else {**facts, FACT: self.base.as_json()}


def same_tokenizer(
    stored: Mapping[str, Any] | None, own: TokenizerInfo, location: Path, *, new_tokens: bool, trains: bool
) -> None:
    """ConfigError where the checkpoint's weights belong to another tokenizer.

    Args:
        stored: The checkpoint's facts, None where it has none.
        own: Tokenizer of this run.
        location: The checkpoint, for messages.
        new_tokens: The weights may be tuned to another vocabulary (`finetune`), which is a line in the log.
        trains: The end of a document matters, since it is in the data.
    """
    if not stored:
        return
    then = TokenizerInfo.of_checkpoint(stored)
    if then.agrees_with(own if trains else replace(own, eod=None)):
        return
    if not new_tokens:
        raise ConfigError.of(
            f"the checkpoint {location} was trained with {then}; this is {own}",
            key="tokenizer_type",
            value=own.kind,
            hint="give tokenizer_type, vocab_file and merge_file of that run"
            + (", or set finetune: true to tune the weights to another tokenizer" if trains else ""),
        )
    _log.warning("the checkpoint %s was trained with another tokenizer: %s; this is %s", location, then, own)
    added = own.vocab_size - then.vocab_size
    if added > 0:
        _log.warning("%d rows of the embedding belong to new tokens", added)


def same_data_order(
    stored: Mapping[str, Any] | None, own: Mapping[str, Any], location: Path, *, override: bool
) -> None:
    """ConfigError for each fact by which the samples that follow would be others than those of the checkpoint's run.

    Args:
        stored: The checkpoint's facts, None where it has none.
        own: Data order of this run.
        location: The checkpoint, for messages.
        override: `override_data_order`, which makes it a line in the log for each.
    """
    if not stored:
        return
    issues = list(_differences(stored, own, location))
    if not override:
        ConfigError.raise_any(issues)
    for issue in issues:
        _log.warning("%s: %s; the samples that follow are in a new order", issue.key, issue.message)


def _differences(stored: Mapping[str, Any], own: Mapping[str, Any], location: Path) -> Iterator[ConfigIssue]:
    for name in dict.fromkeys((*own, *stored)):
        then, now = stored.get(name), own.get(name)
        if then == now or _follows(name, stored, own):
            continue
        if name == "data_path":
            what = f"the checkpoint {location} was trained on {_sets(then)}; these are {_sets(now)}"
            yield ConfigIssue(what, key="data_path", hint=_OVERRIDE_HINT)
        elif name == "passes":
            what = (
                f"the checkpoint's run shuffled {_passes(then)} over the data together, this one shuffles "
                f"{_passes(now)}: samples would be read twice and others never"
            )
            hint = f"{_OVERRIDE_HINT}: as many train_iters, or train_epochs, as need the same number of passes"
            yield ConfigIssue(what, key="train_iters", hint=hint)
        elif name == "retro_project_dir":
            what = f"the checkpoint {location} was trained with the neighbours of another database"
            yield ConfigIssue(what, key=name, hint=_OVERRIDE_HINT)
        elif name == "train_label_data_paths":
            what = f"the checkpoint's run read {then} documents of its data sets, this one reads {now}, by their labels"
            yield ConfigIssue(what, key=name, hint=_OVERRIDE_HINT)
        else:
            what = f"the checkpoint {location} was trained with {then!r}, which gives another order of samples"
            yield ConfigIssue(what, key=name, value=now, hint=_OVERRIDE_HINT)


def _follows(name: str, stored: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """True if a difference does not change the order, or another fact reports it."""
    other_sets = stored.get("data_path") != own.get("data_path")
    if name == "passes":
        return other_sets
    if name == "retro_project_dir":  # earlier checkpoints do not have it
        return name not in stored
    if name == "train_epochs":  # it orders several sets among each other; of one, `passes` says it all
        return len(own.get("data_path") or ()) == 1
    if name == "train_label_data_paths":  # as do lengths, which others tell; earlier checkpoints do not have it
        others = ("seq_length", "pack_impl", "allow_chopped")
        return name not in stored or other_sets or any(stored.get(each) != own.get(each) for each in others)
    return False


def _sets(sets: Sequence[Sequence[Any]] | None) -> str:
    described = [
        f"{documents:,} documents with {tokens:,} tokens [{digest}]" for documents, tokens, digest in sets or ()
    ]
    return ", ".join(described[:4]) + (f" and {len(described) - 4} more" if len(described) > 4 else "")


def _passes(counts: Sequence[int] | None) -> str:
    counts = sorted(set(counts or ()))
    return f"{counts[0]} to {counts[-1]} passes" if len(counts) > 1 else f"{counts[0] if counts else 0} pass(es)"
