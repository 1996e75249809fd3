"""Summary of the data of a run: documents, tokens, epochs and samples of every dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UnpackedSummary:
    """One epoch of unpacked documents: documents and tokens in use, and how many documents are truncated.

    The others are left out.
    """

    documents: int
    """Documents in use."""
    tokens: int
    """Tokens in use."""
    cut: int
    """Documents that are truncated."""

    def describe(self, documents: int, tokens: int, seq_length: int) -> str:
        """Describe the epoch as text, beside the totals of the dataset."""
        parts = [f"a pass reads {self.documents:,} of the documents and {self.tokens:,} of the tokens"]
        if self.cut:
            parts.append(f"{self.cut:,} documents are cut to {seq_length + 1:,} tokens")
        if self.documents < documents:
            parts.append(f"{documents - self.documents:,} are left out")
        return "; ".join(parts)


@dataclass(frozen=True)
class SourcePlan:
    """One data set of a split."""

    path: str
    """Prefix of the token files."""
    documents: int
    """Those that the split may use."""
    tokens: int
    """Those that the split may use."""
    epochs: int
    """Passes over them that the index map holds."""
    samples: int
    """What the map gives."""
    samples_per_pass: float
    """Samples of one pass."""
    asked: int
    """How many the run will take from it."""
    weight: float
    """Its share of the split [fraction]."""
    bytes_per_token: float | None
    """UTF-8 bytes of text a token stands for, where the data set says so."""
    digest: str = ""
    """A fingerprint of the tokens (data_order.py). whole: of samples of whole documents, what a pass makes of them."""
    unpacked: UnpackedSummary | None = None
    """Summary of one epoch, if documents are not packed."""


@dataclass(frozen=True)
class SplitPlan:
    """One of train, valid and test."""

    name: str
    """train, valid or test."""
    samples: int
    """How many can be served."""
    asked: int
    """How many the run wants."""
    seq_length: int
    """Length of a sample [tokens]."""
    sources: tuple[SourcePlan, ...]
    """Datasets of the split."""

    @property
    def documents(self) -> int:
        """Documents of all sources."""
        return sum(source.documents for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of one pass over all sources."""
        return sum(source.tokens for source in self.sources)

    @property
    def passes(self) -> float:
        """How often the run reads an average document of the split."""
        return self.asked / sum(source.samples_per_pass for source in self.sources)

    @property
    def bytes_per_token(self) -> float | None:
        """Text bytes a token stands for, over all sources by their tokens; None unless every source says so."""
        known = [(source.bytes_per_token, source.tokens) for source in self.sources]
        if any(ratio is None for ratio, _ in known):
            return None
        return sum((ratio or 0.0) * tokens for ratio, tokens in known) / self.tokens

    def __str__(self) -> str:
        text = (
            f"{self.name}: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.asked:,} samples of {self.seq_length:,} ({self.passes:.2f} passes)"
        )
        if len(self.sources) == 1:
            return "\n".join([f"{text} from {self.sources[0].path}", *self._unpacked(self.sources[0])])
        parts = [text]
        for source in self.sources:
            parts.append(f"  {source.weight:.1%} {source.path}, {source.tokens:,} tokens")
            parts += self._unpacked(source)
        return "\n".join(parts)

    def _unpacked(self, source: SourcePlan) -> list[str]:
        """What whole documents leave of a data set, where that is not all of it."""
        unpacked = source.unpacked
        if unpacked is None or (unpacked.documents, unpacked.tokens) == (source.documents, source.tokens):
            return []
        return [f"  {unpacked.describe(source.documents, source.tokens, self.seq_length)}"]


@dataclass(frozen=True)
class DataPlan:
    """The splits of a run, None where there is none."""

    train: SplitPlan | None
    """Summary of the training split."""
    valid: SplitPlan | None
    """Summary of the validation split."""
    test: SplitPlan | None
    """Summary of the test split."""
    seconds: float
    """Time to open the data and prepare the index maps [s]."""
    warnings: tuple[str, ...] = ()
    """Lines for the user."""
    notes: tuple[str, ...] = ()
    """What a run reads in place of splits of token files."""
    order: Mapping[str, Any] | None = None
    """What decides which sample is number k, where that is not read from token files."""

    def splits(self) -> Iterator[SplitPlan]:
        """The splits there are."""
        return (split for split in (self.train, self.valid, self.test) if split is not None)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.splits()), *self.notes, *(f"warning: {warning}" for warning in self.warnings)])
