"""Whether the tokenizer of a run made its data: what the cards beside the token files say of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron.data.dataset.sources import LABELS, Split
from megatron.data.indexed.metadata import read_card
from megatron.data.indexed.reader import IndexedDataset
from megatron.errors import ConfigError, ConfigIssue
from megatron.tokenizer_info import TokenizerInfo


def check_tokenizer(splits: Sequence[Split], tokenizer: TokenizerInfo) -> None:
    """Raise ConfigError for every dataset and label set whose metadata names another tokenizer.

    Files without a card are taken as they are: their ids are looked at when they are read.
    """
    issues: dict[str, ConfigIssue] = {}
    for dataset, key in _named(splits):
        card = read_card(dataset.prefix, documents=len(dataset), tokens=len(dataset.tokens))
        if card is not None and not card.tokenizer.agrees_with(tokenizer):
            issues[dataset.prefix] = ConfigIssue(
                f"another tokenizer made this data: {card.tokenizer}; that of the run is {tokenizer}",
                key=key,
                value=dataset.prefix,
                hint="set tokenizer_type and vocab_file to the one that made it, or make the data again; without "
                f"{dataset.prefix}.json beside it, its ids are only held against the size of the vocabulary",
            )
    ConfigError.raise_any(issues.values())


def _named(splits: Sequence[Split]) -> Iterator[tuple[IndexedDataset, str]]:
    """The data sets and label sets, with the keys that name them."""
    for split in splits:
        for source in split.sources:
            yield source.dataset, source.key
            if source.data.labels is not None:
                yield source.data.labels, LABELS[split.name.partition("/")[0]]
