#!/usr/bin/env python
"""Trains a byte-level BPE tokenizer on one's own text.

    python tools/train_tokenizer.py --input data/python_stdlib/train.jsonl
        --tokenizer-output-path data/python_stdlib/tokenizer.json --vocab-size 8192

Reads what tools/preprocess_data.py reads. Writes a tokenizer.json for `tokenizer_type: HFTokenizer`, in which
`<|endoftext|>` is 0 and `<|padding|>` is 1. Flags may be spelt with dashes or underscores.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.count import read_texts
from megatron.data.encode import Skipped
from megatron.data.text_files import find_text_files
from megatron.errors import ConfigError, RunError
from megatron.tokenizers.train import save_tokenizer, train_byte_level_bpe


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", help="files or directories, with commas between them")
    source.add_argument("--json-input-dir", "--json_input_dir", help="a directory of .jsonl and .json files")
    made.add_argument("--jsonl-key", default="text", help="the field of a JSON line that holds the text")
    made.add_argument(
        "--tokenizer-output-path", "--tokenizer_output_path", required=True, help="the tokenizer.json to write"
    )
    made.add_argument("--tokenizer-type", "--tokenizer_type", choices=["BPE"], default="BPE", help="the algorithm")
    made.add_argument("-v", "--vocab-size", "--vocab_size", type=int, default=52000, help="ids, special ones included")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    asked = parser().parse_args(arguments)
    started = time.monotonic()
    try:
        files = find_text_files((asked.input or asked.json_input_dir).split(","))
        skipped = Skipped()
        texts = read_texts(files, asked.jsonl_key, skipped)
        tokenizer = train_byte_level_bpe(texts, asked.vocab_size, show_progress=sys.stderr.isatty())
        output = Path(asked.tokenizer_output_path)
        save_tokenizer(tokenizer, output)
    except (ConfigError, RunError) as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    if skipped.total:
        print(f"{skipped}\n  {skipped.examples[0]}")
    print(f"{output}: {tokenizer.get_vocab_size():,} tokens, trained in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
