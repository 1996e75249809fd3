#!/usr/bin/env python
"""Turns text into the token files that training reads.

    python tools/preprocess_data.py --input train.jsonl --output-prefix data/train --append-eod
        --tokenizer-type HFTokenizer --vocab-file tokenizer.json --workers 8

Reads .jsonl and .txt files, also as .gz, .bz2, .xz and (with the package zstandard) .zst, and directories of them.
Writes `<output-prefix>_<key>_document.bin` and `.idx` for each key, and `.json` with what is known about them. Exit
code 0, 1 for a fault in the data or on the way, 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.preprocess import Result, preprocess
from megatron.data.progress import ProgressLine
from megatron.data.text_files import find_text_files
from megatron.errors import ConfigError, RunError
from megatron.registry import TOKENIZERS
from megatron.tokenizers import make_tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description="Turn text into the token files that training reads.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text = made.add_argument_group("text")
    text.add_argument("--input", required=True, help="files or directories, with commas between them")
    text.add_argument(
        "--jsonl-keys", nargs="+", default=["text"], help="fields of a JSON line; each gets its own files"
    )
    text.add_argument("--num-docs", type=int, help="how many documents there are, for the time left")
    text.add_argument("--strict", action="store_true", help="end at the first line that is no document, not skip it")
    tokens = made.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", required=True, help=f"one of {', '.join(TOKENIZERS.names)}")
    tokens.add_argument("--vocab-file", help="the tokenizer's file: tokenizer.json for HFTokenizer")
    tokens.add_argument("--merge-file", help="the merges, where the tokenizer has them in a file of their own")
    tokens.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    tokens.add_argument("--ftfy", action="store_true", help="mend broken Unicode with the package ftfy")
    output = made.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, help="start of the files' paths")
    output.add_argument(
        "--dataset-impl", choices=["lazy", "cached", "mmap"], default="mmap", help="format of the files"
    )
    work = made.add_argument_group("work")
    work.add_argument("--workers", type=int, default=1, help="processes; the files are the same for any number")
    work.add_argument("--log-interval", type=int, default=100, help="documents between two progress lines at least")
    return made


def run(asked: argparse.Namespace) -> Result:
    """Does what the command line asks. Raises ConfigError and RunError."""
    if asked.dataset_impl != "mmap":
        raise ConfigError.of(
            "the legacy formats are not written; training reads the memory-mapped one",
            key="dataset_impl",
            value=asked.dataset_impl,
            remedy="leave it out",
        )
    files = find_text_files(name for name in asked.input.split(",") if name)
    tokenizer = make_tokenizer(asked.tokenizer_type, vocab_file=asked.vocab_file, merge_file=asked.merge_file)
    line = ProgressLine(every=asked.log_interval, known_documents=asked.num_docs)
    try:
        return preprocess(
            files,
            output_prefix=asked.output_prefix,
            tokenizer=tokenizer,
            tokenizer_type=asked.tokenizer_type,
            keys=asked.jsonl_keys,
            append_eod=asked.append_eod,
            repair=asked.ftfy,
            workers=asked.workers,
            strict=asked.strict,
            report=line,
        )
    finally:
        line.close()


def told(result: Result) -> str:
    """What was written and what was left out, for people."""
    lines = [
        f"{written.prefix}.bin and .idx: {written.card.documents:,} documents, {written.card.tokens:,} tokens, "
        f"{written.card.bytes_per_token:.3f} bytes a token"
        for written in result.outputs
    ]
    speed = result.content_bytes / 1e6 / result.seconds
    lines.append(f"{result.content_bytes:,} bytes read in {result.seconds:.1f} s ({speed:.1f} MB/s)")
    if result.empty:
        lines.append(f"{result.empty:,} documents without text left out")
    if result.skipped.total:
        lines += [str(result.skipped), *(f"  {example}" for example in result.skipped.examples)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    try:
        print(told(run(parser().parse_args(arguments))))
    except (ConfigError, RunError) as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
