"""Join pairs of token files into one, as if their text had been tokenised at once: the same bytes.

Documents keep their order and their items. Tokens are copied, never decoded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron.data.indexed.metadata import DatasetCard, read_card
from megatron.data.indexed.open_file_limit import PAIR, allow_open_files
from megatron.data.indexed.reader import IndexedDataset, bin_path, idx_path
from megatron.data.indexed.writer import DatasetWriter
from megatron.errors import ConfigError, ConfigIssue

AT_ONCE = 8 << 20  # tokens that are copied at once
SHOWN = 8  # missing shards that are named
_SHARD = re.compile(r"(?P<before>.*)-(?P<number>[0-9]{5,})-of-(?P<count>[0-9]{5,})(?P<after>.*)", re.DOTALL)


def find_pairs(names: Sequence[str], output_prefix: str | None = None) -> list[str]:
    """Lists the prefixes of pairs. A directory is read as the pairs in it, sorted by name, numbers by their value.

    Raises ConfigError for halves of pairs, and for a directory that the output would be written to or that holds an
    earlier merge of its pairs: their documents would be written twice.
    """
    found: list[str] = []
    issues = []
    for name in names:
        folder = Path(name)
        if not folder.is_dir():
            found.append(name.removesuffix(".bin").removesuffix(".idx"))
            continue
        ends = {
            suffix: {str(path)[: -len(suffix)] for path in folder.glob(f"*{suffix}")} for suffix in (".bin", ".idx")
        }
        for prefix in sorted(ends[".bin"] ^ ends[".idx"]):
            missing = idx_path(prefix) if prefix in ends[".bin"] else bin_path(prefix)
            hint = "make it again, or take its other half out of the directory"
            issues.append(ConfigIssue(f"{missing} is missing", key="input", value=name, hint=hint))
        pairs = sorted(ends[".bin"] & ends[".idx"], key=_by_number)
        if output_prefix is not None and Path(output_prefix).resolve().parent == folder.resolve():
            what = "it is in a directory of the input, where a later merge would read it as one more pair"
            hint = "write it to another directory, or name the pairs of the input one by one"
            issues.append(ConfigIssue(what, key="output_prefix", value=output_prefix, hint=hint))
        elif not issues:
            issues += _earlier_merges(pairs)
        found += pairs
    ConfigError.raise_any(issues)
    if not found:
        raise ConfigError.of("there is no pair of token files", key="input", value=list(names))
    return found


def _earlier_merges(prefixes: Sequence[str]) -> list[ConfigIssue]:
    """The pair of a directory that holds the documents of all others, by their lengths."""
    if len(prefixes) < 3:  # of two equal pairs none can be called the merge
        return []
    allow_open_files(PAIR * len(prefixes))
    sizes = {prefix: IndexedDataset(prefix, key="input").sizes for prefix in prefixes}
    largest = max(prefixes, key=lambda prefix: len(sizes[prefix]))
    others = [sizes[prefix] for prefix in prefixes if prefix != largest]
    if sum(map(len, others)) != len(sizes[largest]) or not np.array_equal(np.concatenate(others), sizes[largest]):
        return []
    what = f"it holds the documents of the {len(others)} other pairs of its directory, as a merge of them does"
    hint = "move it to another directory, or name the pairs one by one"
    return [ConfigIssue(what, key="input", value=largest, hint=hint)]


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"([0-9]+)", name)]


def missing_shards(prefixes: Sequence[str]) -> list[ConfigIssue]:
    """What lacks of sets of shards, whose names say of how many each is one (`-00001-of-00003`)."""
    sets: dict[tuple[str, str], dict[int, set[int]]] = {}
    for prefix in prefixes:
        found = _SHARD.fullmatch(prefix)
        if found is not None:
            counts = sets.setdefault((found["before"], found["after"]), {})
            counts.setdefault(int(found["count"]), set()).add(int(found["number"]))
    issues = []
    for (before, after), counts in sets.items():
        name = f"{before}-*{after}"
        if len(counts) > 1:
            what = f"there are shards of {' and of '.join(map(str, sorted(counts)))}, which hold the same documents"
            issues.append(ConfigIssue(what, key="input", value=name, hint="leave those of one of them"))
            continue
        ((count, numbers),) = counts.items()
        missing = [number for number in range(count) if number not in numbers]
        if missing:
            shown = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
            what = f"{len(missing)} of {count} shards are missing: {shown}"
            hint = "make them with tools/preprocess_data.py --shard, or name the files otherwise if they belong alone"
            issues.append(ConfigIssue(what, key="input", value=name, hint=hint))
    return issues


def merge(prefixes: Sequence[str], output_prefix: str) -> tuple[int, int]:
    """Writes the pairs one after another to `<output_prefix>.bin` and `.idx`; returns documents and tokens.

    Raises ConfigError when a file or a shard is missing, the pairs have different dtypes or tokenizers, or one of them
    is the output; RunError when one is damaged.
    """
    allow_open_files(PAIR * len(prefixes))
    sources = [IndexedDataset(prefix, key="input") for prefix in prefixes]
    issues = [
        ConfigIssue(
            f"its tokens are {source.dtype.name}, those of {prefixes[0]} {sources[0].dtype.name}",
            key="input",
            value=prefix,
            hint="make all of them with the same tokenizer",
        )
        for prefix, source in zip(prefixes, sources, strict=True)
        if source.dtype != sources[0].dtype
    ]
    if any(Path(prefix).resolve() == Path(output_prefix).resolve() for prefix in prefixes):
        issues.append(ConfigIssue("the output is one of the inputs", key="output_prefix", value=output_prefix))
    cards = [_card_of(source) for source in sources]
    ConfigError.raise_any([*issues, *missing_shards(prefixes), *_strangers(prefixes, cards)])
    for source in sources:
        source.check()
    with DatasetWriter(output_prefix, sources[0].dtype) as writer:
        for source in sources:
            _copy(source, writer)
        writer.card = _joined(cards)
    return writer.documents, writer.tokens


def _copy(source: IndexedDataset, writer: DatasetWriter) -> None:
    """All documents of a pair, many at a time; a document is never parted."""
    borders = source.document_index
    sizes = source.sizes
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    plain = len(borders) == len(sizes) + 1 and bool((np.diff(borders) == 1).all())
    document, documents = 0, len(borders) - 1
    while document < documents:
        limit = ends[borders[document]] + AT_ONCE
        last = max(int(np.searchsorted(ends[borders], limit, "right")) - 1, document + 1)
        items = slice(int(borders[document]), int(borders[last]))
        tokens = source.tokens[ends[items.start] : ends[items.stop]]
        writer.add_documents(tokens, sizes[items], None if plain else np.diff(borders[document : last + 1]))
        document = last


def _card_of(source: IndexedDataset) -> DatasetCard | None:
    return read_card(source.prefix, documents=len(source.document_index) - 1, tokens=len(source.tokens))


def _strangers(prefixes: Sequence[str], cards: Sequence[DatasetCard | None]) -> list[ConfigIssue]:
    """The pairs that another tokenizer made than the first of which most is known."""
    known = [(prefix, card.tokenizer) for prefix, card in zip(prefixes, cards, strict=True) if card is not None]
    sure = [(prefix, facts) for prefix, facts in known if facts.fingerprint is not None] or known
    return [
        ConfigIssue(
            f"another tokenizer made it ({facts}) than {sure[0][0]} ({sure[0][1]})",
            key="input",
            value=prefix,
            hint="make all of them with the same tokenizer",
        )
        for prefix, facts in known
        if not facts.agrees_with(sure[0][1])
    ]


def _joined(cards: Sequence[DatasetCard | None]) -> DatasetCard | None:
    """What is known of all together: only when it is known of each and they agree."""
    known = [card for card in cards if card is not None]
    if len(known) != len(cards) or len({card.eod for card in known}) != 1:
        return None
    return replace(
        known[0],
        documents=sum(card.documents for card in known),
        tokens=sum(card.tokens for card in known),
        text_bytes=sum(card.text_bytes for card in known),
    )
