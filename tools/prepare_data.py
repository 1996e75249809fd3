#!/usr/bin/env python
"""Prepares a corpus by name and tokenises it.

    python prepare_data.py python_stdlib python prepare_data.py python_stdlib -t HFTokenizer -v
    data/python_stdlib/tokenizer.json python prepare_data.py enwik8 -t CharLevelTokenizer

python_stdlib is built from files of this machine: `<data-dir>/python_stdlib/train.jsonl` and `valid.jsonl`, and with a
tokenizer `train_text_document.bin` and `.idx`, `valid_text_document.bin` and `.idx` beside them.

The public corpora are downloaded to `<data-dir>/<name>/` and tokenised into `<name>_text_document.bin` and `.idx`
there, with an end-of-document token after each document. Without -t they take GPT2BPETokenizer, whose files are
downloaded to the data directory. An interrupted download is resumed, also in a later run. Every file's SHA-256 is
compared with the known one, and is in `SHA256SUMS`. Existing files are reused, unless -f is given.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.corpora.catalog import CORPORA, Corpus, find_corpus, read_about
from megatron.data.corpora.download import DownloadSource, fetch
from megatron.data.corpora.public import GPT2_MERGES, GPT2_VOCAB, PUBLIC_CORPORA, PublicCorpus
from megatron.data.indexed.reader import bin_path, idx_path
from megatron.data.preprocess.document_types import PlainText
from megatron.data.preprocess.pipeline import preprocess
from megatron.data.preprocess.progress_bar import ProgressLine, TransferLine
from megatron.data.preprocess.text_files import find_text_files
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from megatron.tokenizer_info import describe_tokenizer
from megatron.tokenizers import Tokenizer, make_tokenizer
from tools.preprocess_data import format_result

PARTS = ("train", "valid")
PUBLIC_TOKENIZER = "GPT2BPETokenizer"
NOTHING = "pass"  # the public name for doing nothing


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    listed = "\n".join(f"  {corpus.name}: {corpus.doc}" for corpus in (*CORPORA.values(), *PUBLIC_CORPORA.values()))
    result = argparse.ArgumentParser(
        description="Prepare a corpus by name.",
        epilog=f"corpora:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("dataset", nargs="?", default="python_stdlib", help="which corpus (default: python_stdlib)")
    result.add_argument("-d", "--data-dir", help="where corpora are kept (default: $DATA_DIR or ./data)")
    result.add_argument(
        "-t",
        "--tokenizer",
        help=f"write token files with a tokenizer of this type (default: {PUBLIC_TOKENIZER}; none for python_stdlib)",
    )
    result.add_argument("-v", "--vocab-file", help="the tokenizer's file")
    result.add_argument("-m", "--merge-file", help="the tokenizer's merges, where they have a file of their own")
    result.add_argument("-f", "--force-redownload", action="store_true", help="fetch and prepare again what is there")
    result.add_argument("--mirror", help="a folder or URL that holds the files of the corpus, tried first")
    result.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise")
    return result


def prepare_here(corpus: Corpus, folder: Path, args: argparse.Namespace) -> None:
    """Prepares a corpus from files of this machine. Raises ConfigError and RunError."""
    about = None if args.force_redownload else read_about(folder)
    if about is not None:
        print(f"{folder} holds {about.corpus} already ({about.source}); -f prepares it again")
    else:
        about = corpus.prepare(folder)
    print(f"{folder}/train.jsonl: {about.train_documents:,} documents, {about.train_bytes:,} bytes")
    print(f"{folder}/valid.jsonl: {about.valid_documents:,} documents, {about.valid_bytes:,} bytes")
    if args.tokenizer:
        tokenizer = make_tokenizer(args.tokenizer, vocab_file=args.vocab_file, merge_file=args.merge_file)
        for part in PARTS:
            tokenise([folder / f"{part}.jsonl"], folder / part, tokenizer, args.tokenizer, args.workers)


def prepare_public(corpus: PublicCorpus, data: Path, args: argparse.Namespace) -> None:
    """Downloads and prepares a corpus. Raises ConfigError and RunError."""
    kind = args.tokenizer or PUBLIC_TOKENIZER
    folder = data / corpus.folder
    prefix = folder / corpus.folder
    text = f"{prefix}_text_document"
    if not args.force_redownload and bin_path(text).exists() and idx_path(text).exists():
        print(f"{text}.bin and .idx are there already; -f prepares them again")
        return
    # A missing tokenizer is reported before gigabytes are downloaded.
    tokenizer = make_tokenizer(kind, **tokenizer_files(kind, data, args))
    for source in corpus.sources:
        fetch_source(source, folder, args)
    files = [folder / source.name for source in corpus.sources]
    workers = min(args.workers, corpus.workers or args.workers)
    tokenise(files, prefix, tokenizer, kind, workers, corpus.documents)


def tokenizer_files(kind: str, data: Path, args: argparse.Namespace) -> dict[str, str | None]:
    """Returns the files of a tokenizer, by default those of GPT-2."""
    files = {"vocab_file": args.vocab_file, "merge_file": args.merge_file}
    if kind == PUBLIC_TOKENIZER:
        for name, source in (("vocab_file", GPT2_VOCAB), ("merge_file", GPT2_MERGES)):
            if files[name] is None:
                fetch_source(source, data, argparse.Namespace(mirror=args.mirror, force_redownload=False))
                files[name] = str(data / source.name)
    return files


def fetch_source(source: DownloadSource, folder: Path, args: argparse.Namespace) -> None:
    """Downloads a file to the folder and prints a line. Raises RunError."""
    if args.mirror:
        mirror = args.mirror if "://" in args.mirror else Path(args.mirror).resolve().as_uri()
        source = replace(source, urls=(f"{mirror.rstrip('/')}/{source.name}", *source.urls))
    line = TransferLine()
    try:
        digest = fetch(source, folder, again=args.force_redownload, report=line)
    finally:
        line.close()
    path = folder / source.name
    print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {digest}", flush=True)


def tokenise(
    files: list[Path], prefix: Path, tokenizer: Tokenizer, kind: str, workers: int, documents: int | None = None
) -> None:
    """Writes `<prefix>_text_document.bin` and `.idx`. Raises ConfigError and RunError.

    Args:
        files: of text.
        prefix: of the token files.
        tokenizer: encodes the text.
        kind: its tokenizer_type.
        workers: processes.
        documents: number of documents, if known, for the time left.
    """
    line = ProgressLine(known_documents=documents)
    try:
        result = preprocess(
            find_text_files(map(str, files)),
            PlainText(tokenizer, append_eod=True),
            output_prefix=str(prefix),
            facts=describe_tokenizer(kind, tokenizer),
            workers=workers,
            report=line,
        )
    finally:
        line.close()
    print(format_result(result))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    if args.dataset == NOTHING:
        return 0
    data = Path(args.data_dir or os.environ.get("DATA_DIR") or "data")
    try:
        corpus = find_corpus(args.dataset)
        if isinstance(corpus, PublicCorpus):
            prepare_public(corpus, data, args)
        else:
            prepare_here(corpus, data / corpus.name, args)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
