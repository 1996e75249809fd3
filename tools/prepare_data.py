#!/usr/bin/env python
"""Prepares a corpus by name, and tokenises it where a tokenizer is named.

    python prepare_data.py python_stdlib
    python prepare_data.py python_stdlib -t HFTokenizer -v data/python_stdlib/tokenizer.json

Writes `<data-dir>/<DATASET>/train.jsonl` and `valid.jsonl`, and with a tokenizer `train_text_document.bin` and `.idx`,
`valid_text_document.bin` and `.idx` beside them. What is there already is kept, unless -f is given.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.corpora import CORPORA, About, find_corpus, read_about
from megatron.data.preprocess import TokenizerFacts, preprocess
from megatron.data.progress import ProgressLine
from megatron.data.recipes import PlainText
from megatron.data.text_files import find_text_files
from megatron.errors import ConfigError, RunError
from megatron.tokenizers import make_tokenizer

PARTS = ("train", "valid")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(f"  {corpus.name}: {corpus.doc}" for corpus in CORPORA.values())
    made = argparse.ArgumentParser(
        description="Prepare a corpus by name.",
        epilog=f"corpora:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("dataset", nargs="?", default="python_stdlib", help="which corpus (default: python_stdlib)")
    made.add_argument("-d", "--data-dir", help="where corpora are kept (default: $DATA_DIR or ./data)")
    made.add_argument("-t", "--tokenizer", help="also write token files with a tokenizer of this type")
    made.add_argument("-v", "--vocab-file", help="the tokenizer's file")
    made.add_argument("-m", "--merge-file", help="the tokenizer's merges, where they have a file of their own")
    made.add_argument("-f", "--force-redownload", action="store_true", help="prepare again what is there already")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise")
    return made


def prepare(dataset: str, folder: Path, *, again: bool) -> About:
    """Prepares a corpus in a folder. Raises ConfigError and RunError."""
    corpus = find_corpus(dataset)
    about = None if again else read_about(folder)
    if about is not None:
        print(f"{folder} holds {about.corpus} already ({about.source}); -f prepares it again")
        return about
    return corpus.prepare(folder)


def tokenise(folder: Path, asked: argparse.Namespace) -> None:
    """Writes the token files of both parts. Raises ConfigError and RunError."""
    tokenizer = make_tokenizer(asked.tokenizer, vocab_file=asked.vocab_file, merge_file=asked.merge_file)
    for part in PARTS:
        line = ProgressLine()
        try:
            result = preprocess(
                find_text_files([str(folder / f"{part}.jsonl")]),
                PlainText(tokenizer, append_eod=True),
                output_prefix=str(folder / part),
                facts=TokenizerFacts(asked.tokenizer, tokenizer.vocab_size, tokenizer.eod),
                workers=asked.workers,
                report=line,
            )
        finally:
            line.close()
        for written in result.outputs:
            print(f"{written.prefix}.bin and .idx: {written.card.tokens:,} tokens")


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    asked = parser().parse_args(arguments)
    folder = Path(asked.data_dir or os.environ.get("DATA_DIR") or "data") / asked.dataset
    try:
        about = prepare(asked.dataset, folder, again=asked.force_redownload)
        print(f"{folder}/train.jsonl: {about.train_documents:,} documents, {about.train_bytes:,} bytes")
        print(f"{folder}/valid.jsonl: {about.valid_documents:,} documents, {about.valid_bytes:,} bytes")
        if asked.tokenizer:
            tokenise(folder, asked)
    except (ConfigError, RunError) as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
