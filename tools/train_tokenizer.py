#!/usr/bin/env python
"""Trains a tokenizer on one's own text: byte-level BPE, or a sentencepiece model (unigram or its BPE).

    python tools/train_tokenizer.py --input data/python_stdlib/train.jsonl
        --tokenizer-output-path data/python_stdlib/tokenizer.json --vocab-size 8192

Reads what tools/preprocess_data.py reads. Writes a tokenizer.json for `tokenizer_type: HFTokenizer`, in which
`<|endoftext|>` is 0 and `<|padding|>` is 1; with --tokenizer-type unigram or sentencepiece-bpe a .model for
`tokenizer_type: SPMTokenizer`. Flags may be spelt with dashes or underscores.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.preprocess.count_tokens import read_texts
from megatron.data.preprocess.encode import SkippedCounts
from megatron.data.preprocess.text_files import find_text_files
from megatron.errors import ConfigError, RunError
from megatron.tokenizers.trainer import save_tokenizer, train_byte_level_bpe, train_sentence_piece

# The public name of an algorithm, and sentencepiece's where it trains.
ALGORITHMS = {"BPE": None, "unigram": "unigram", "sentencepiece": "unigram", "sentencepiece-bpe": "bpe"}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(
        description="Train a tokenizer.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", help="files or directories, with commas between them")
    source.add_argument("--json-input-dir", "--json_input_dir", help="a directory of .jsonl and .json files")
    result.add_argument("--jsonl-key", default="text", help="the field of a JSON line that holds the text")
    result.add_argument(
        "--tokenizer-output-path",
        "--tokenizer_output_path",
        required=True,
        help="the tokenizer.json or .model to write",
    )
    result.add_argument(
        "--tokenizer-type", "--tokenizer_type", choices=list(ALGORITHMS), default="BPE", help="the algorithm"
    )
    result.add_argument(
        "-v", "--vocab-size", "--vocab_size", type=int, default=52000, help="ids, special ones included"
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    started = time.monotonic()
    try:
        files = find_text_files((args.input or args.json_input_dir).split(","))
        skipped = SkippedCounts()
        texts = read_texts(files, args.jsonl_key, skipped)
        output = Path(args.tokenizer_output_path)
        algorithm = ALGORITHMS[args.tokenizer_type]
        if algorithm is None:
            tokenizer = train_byte_level_bpe(texts, args.vocab_size, show_progress=sys.stderr.isatty())
            save_tokenizer(tokenizer, output)
            size = tokenizer.get_vocab_size()
        else:
            size = train_sentence_piece(texts, args.vocab_size, output, algorithm=algorithm)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if skipped.total:
        print(f"{skipped}\n  {skipped.examples[0]}")
    print(f"{output}: {size:,} tokens, trained in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
