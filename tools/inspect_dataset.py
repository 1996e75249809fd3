#!/usr/bin/env python
"""Shows the content of token files: header, counts, most common tokens, documents; and checks that they are intact.

    python tools/inspect_dataset.py data/train_text_document --check --histogram 20 --document 0 17
        --tokenizer-type HFTokenizer --vocab-file tokenizer.json

--check reads every length, every start and every token. Without a tokenizer, documents are shown as ids.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.indexed.metadata import read_card
from megatron.data.indexed.reader import HEADER, LEGACY_HEADER, VERSION, IndexedDataset, bin_path, idx_path
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from megatron.tokenizer_info import describe_tokenizer
from megatron.tokenizers import Tokenizer, make_tokenizer

CHUNK_TOKENS = 16 << 20  # tokens that are counted at once
_SHARES = ("least", "median", "99 %", "most")
MAX_SHOWN = 400  # ids of a document that are shown without a tokenizer


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(description="Show the content of token files, and check that they are intact.")
    result.add_argument("prefix", help="the path without .bin and .idx")
    result.add_argument("--document", type=int, nargs="+", default=[], help="show these documents, counted from 0")
    result.add_argument("--histogram", type=int, metavar="N", help="show the N commonest tokens")
    result.add_argument("--check", action="store_true", help="read everything and check it")
    result.add_argument("--tokenizer-type", help="decode with a tokenizer of this type")
    result.add_argument("--vocab-file", help="the tokenizer's file")
    result.add_argument("--merge-file", help="the tokenizer's merges")
    return result


def header(data: IndexedDataset, prefix: str) -> list[str]:
    """Formats the header and the counts, one per line."""
    sizes = data.sizes
    kind, size = ("legacy format, ", LEGACY_HEADER.size) if data.legacy else ("", HEADER.size)
    lines = [
        f"{idx_path(prefix)}: {kind}version {VERSION}, {data.dtype.name} tokens, header of {size} bytes",
        f"{bin_path(prefix)}: {data.bin_bytes:,} bytes",
        f"documents: {len(data.document_index) - 1:,}",
        f"items: {len(data):,}",
        f"tokens: {int(sizes.sum(dtype=np.int64)):,}",
    ]
    if len(data):
        shares = np.percentile(sizes, [0, 50, 99, 100]).astype(int)
        lines.append("item lengths: " + ", ".join(f"{n} {v:,}" for n, v in zip(_SHARES, shares, strict=True)))
        lines.append(f"empty items: {int((sizes == 0).sum()):,}")
    return lines


def histogram(data: IndexedDataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens that occur and their counts, the most common first."""
    if data.dtype.kind not in "iu":
        raise RunError.of(f"tokens of type {data.dtype.name} cannot be counted", location=data.prefix)
    totals: dict[int, int] = {}
    for first in range(0, len(data.tokens), CHUNK_TOKENS):
        tokens, counts = np.unique(data.tokens[first : first + CHUNK_TOKENS], return_counts=True)
        for token, count in zip(tokens.tolist(), counts.tolist(), strict=True):
            totals[token] = totals.get(token, 0) + count
    ordered = sorted(totals.items(), key=lambda pair: (-pair[1], pair[0]))
    return np.array([token for token, _ in ordered], np.int64), np.array([count for _, count in ordered], np.int64)


def check(data: IndexedDataset, tokenizer: Tokenizer | None) -> list[str]:
    """Reads and checks everything. Raises RunError for an error."""
    data.check()
    borders = data.document_index
    if len(borders) == 0 or borders[0] != 0 or borders[-1] != len(data) or (np.diff(borders) < 0).any():
        raise RunError.of(
            "the document index does not run from 0 to the number of items", location=str(idx_path(data.prefix))
        )
    tokens, _ = histogram(data)
    if tokenizer is not None and len(tokens) and int(tokens.max()) >= tokenizer.vocab_size:
        raise RunError.of(
            f"there is a token {int(tokens.max())}, and the tokenizer has {tokenizer.vocab_size}",
            location=str(bin_path(data.prefix)),
            hint="name the tokenizer that made these files",
        )
    extremes = f", ids {int(tokens.min())} to {int(tokens.max())}, {len(tokens):,} different" if len(tokens) else ""
    return [f"intact: every start follows from the lengths{extremes}"]


def document(data: IndexedDataset, number: int, tokenizer: Tokenizer | None) -> list[str]:
    """Formats one document as text or ids. Raises ConfigError when there is none of this number."""
    documents = len(data.document_index) - 1
    if not 0 <= number < documents:
        hint = f"the numbers are 0 to {documents - 1}"
        raise ConfigError.of("there is no document of this number", key="document", value=number, hint=hint)
    items = range(int(data.document_index[number]), int(data.document_index[number + 1]))
    lines = [f"document {number}: {len(items)} items, {sum(int(data.sizes[item]) for item in items):,} tokens"]
    for item in items:
        ids = data[item].tolist()
        if tokenizer is None:
            lines.append(" ".join(map(str, ids[:MAX_SHOWN])) + (" ..." if len(ids) > MAX_SHOWN else ""))
        else:
            lines.append(tokenizer.decode(ids))
    return lines


def describe(args: argparse.Namespace) -> list[str]:
    """Formats everything that the command line requests. Raises ConfigError and RunError."""
    prefix = args.prefix.removesuffix(".bin").removesuffix(".idx")
    data = IndexedDataset(prefix, key="prefix")
    tokenizer = None
    if args.tokenizer_type:
        tokenizer = make_tokenizer(args.tokenizer_type, vocab_file=args.vocab_file, merge_file=args.merge_file)
        _check_tokenizer(data, args.tokenizer_type, tokenizer)
    lines = header(data, prefix)
    if args.check:
        lines += check(data, tokenizer)
    if args.histogram:
        tokens, counts = histogram(data)
        share = 100 / max(int(counts.sum()), 1)
        for token, count in zip(tokens[: args.histogram].tolist(), counts[: args.histogram].tolist(), strict=True):
            text = "" if tokenizer is None else f"  {tokenizer.decode([token])!r}"
            lines.append(f"{token:>8}  {count:>12,}  {count * share:5.2f} %{text}")
    for number in args.document:
        lines += document(data, number, tokenizer)
    return lines


def _check_tokenizer(data: IndexedDataset, kind: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError when the metadata names another tokenizer."""
    card = read_card(data.prefix, documents=len(data.document_index) - 1, tokens=len(data.tokens))
    facts = describe_tokenizer(kind, tokenizer)
    if card is not None and not card.tokenizer.agrees_with(facts):
        hint = "name the tokenizer that made these files"
        what = f"this is {facts}, and another tokenizer made {data.prefix}: {card.tokenizer}"
        raise ConfigError.of(what, key="tokenizer_type", value=kind, hint=hint)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    try:
        print("\n".join(describe(parser().parse_args(arguments))))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
