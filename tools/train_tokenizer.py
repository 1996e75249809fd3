#!/usr/bin/env python
"""Trains a tokenizer on one's own text: byte-level BPE, WordPiece, or a sentencepiece model (unigram or its BPE).

    python tools/train_tokenizer.py --input data/python_stdlib/train.jsonl
        --tokenizer-output-path data/python_stdlib/tokenizer.json --vocab-size 8192

Reads what tools/preprocess_data.py reads. Writes a tokenizer.json for `tokenizer_type: HFTokenizer`, in which
`<|endoftext|>` is 0 and `<|padding|>` is 1; with --tokenizer-type unigram or sentencepiece-bpe a .model for
`tokenizer_type: SPMTokenizer`; with WordPiece or WordPiece-case a vocab.txt for `BertWordPieceLowerCase` or
`BertWordPieceCase`. Flags may be spelt with dashes or underscores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.preprocess.count_tokens import read_texts
from megatron.data.preprocess.encode import SkippedCounts
from megatron.data.preprocess.text_files import TextFile, find_text_files
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from megatron.tokenizers.bert import span_special
from megatron.tokenizers.trainer import save_tokenizer, train_byte_level_bpe, train_sentence_piece
from megatron.tokenizers.word_piece_trainer import save_word_pieces, train_word_pieces

# The public name of an algorithm, and sentencepiece's where it trains.
ALGORITHMS = {"BPE": None, "unigram": "unigram", "sentencepiece": "unigram", "sentencepiece-bpe": "bpe"}
# Whether a WordPiece vocabulary is in lower case.
WORD_PIECES = {"WordPiece": True, "WordPiece-case": False}


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
        help="the tokenizer.json, .model or vocab.txt to write",
    )
    result.add_argument(
        "--tokenizer-type", "--tokenizer_type", choices=[*ALGORITHMS, *WORD_PIECES], default="BPE", help="the algorithm"
    )
    result.add_argument(
        "-v", "--vocab-size", "--vocab_size", type=int, default=52000, help="ids, special ones included"
    )
    result.add_argument(
        "--extra-ids",
        "--extra_ids",
        type=int,
        default=0,
        help="sentinels <extra_id_0> and on, with [BOS] and [EOS], at the end of a WordPiece vocabulary: for T5",
    )
    return result


def learn_word_pieces(args: argparse.Namespace, files: Sequence[TextFile], output: Path, skipped: SkippedCounts) -> int:
    """Writes a vocab.txt and returns the number of its pieces. Raises ConfigError and RunError.

    Args:
        args: The command line.
        files: The texts.
        output: The file to write.
        skipped: Counts lines without a document, in the last of two passes.
    """
    counts = iter((SkippedCounts(), skipped))
    of_spans = span_special(args.extra_ids) if args.extra_ids else []
    pieces = train_word_pieces(
        lambda: read_texts(files, args.jsonl_key, next(counts)),
        args.vocab_size - len(of_spans),
        lower=WORD_PIECES[args.tokenizer_type],
        show_progress=sys.stderr.isatty(),
    )
    pieces += [token for token in of_spans if token not in pieces]
    save_word_pieces(pieces, output)
    return len(pieces)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    started = time.monotonic()
    try:
        files = find_text_files((args.input or args.json_input_dir).split(","))
        skipped = SkippedCounts()
        output = Path(args.tokenizer_output_path)
        if args.tokenizer_type in WORD_PIECES:
            size = learn_word_pieces(args, files, output, skipped)
        elif (algorithm := ALGORITHMS[args.tokenizer_type]) is None:
            texts = read_texts(files, args.jsonl_key, skipped)
            tokenizer = train_byte_level_bpe(texts, args.vocab_size, show_progress=sys.stderr.isatty())
            save_tokenizer(tokenizer, output)
            size = tokenizer.get_vocab_size()
        else:
            texts = read_texts(files, args.jsonl_key, skipped)
            size = train_sentence_piece(texts, args.vocab_size, output, algorithm=algorithm)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if skipped.total:
        print(f"{skipped}\n  {skipped.examples[0]}")
    print(f"{output}: {size:,} tokens, trained in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
