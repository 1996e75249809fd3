#!/usr/bin/env python
"""Counts documents and tokens of token files.

    python tools/count_tokens.py data/train_text_document [...]

A directory means the pairs in it. Reads the .idx files only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.indexed.merge import find_pairs
from megatron.data.indexed.reader import IndexedDataset
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description="Count documents and tokens of token files.")
    parser.add_argument("prefixes", nargs="+", help="paths without .bin and .idx, or directories")
    args = parser.parse_args(arguments)
    documents = tokens = 0
    try:
        prefixes = find_pairs(args.prefixes)
        for prefix in prefixes:
            data = IndexedDataset(prefix, key="prefixes")
            found = len(data.document_index) - 1, int(data.sizes.sum(dtype="int64"))
            print(f"{prefix}: {found[0]:,} documents, {found[1]:,} tokens")
            documents, tokens = documents + found[0], tokens + found[1]
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if len(prefixes) > 1:
        print(f"together: {documents:,} documents, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
