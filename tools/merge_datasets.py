#!/usr/bin/env python
"""Joins pairs of token files into one, as if their text had been tokenised at once.

    python tools/merge_datasets.py --input DIRECTORY --output-prefix data/all_text_document
    python tools/merge_datasets.py --input data/a_text_document,data/b_text_document --output-prefix data/all

A directory stands for the pairs in it, sorted by name, numbers by their value. Documents, and the items of each, are
kept. Of shards (`NAME-00001-of-00003`) all must be there. The output is written outside the directories of the input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.indexed.merge import find_pairs, merge
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(description="Join pairs of token files into one.")
    result.add_argument("--input", required=True, help="directories and prefixes, with commas between them")
    result.add_argument("--output-prefix", "--output_prefix", required=True, help="the path without .bin and .idx")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        prefixes = find_pairs([name for name in args.input.split(",") if name], args.output_prefix)
        documents, tokens = merge(prefixes, args.output_prefix)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{args.output_prefix}.bin and .idx: {documents:,} documents, {tokens:,} tokens of {len(prefixes)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
