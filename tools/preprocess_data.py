#!/usr/bin/env python
"""Tokenises text into the token files of training.

    python tools/preprocess_data.py --input train.jsonl --output-prefix data/train --append-eod
        --tokenizer-type HFTokenizer --vocab-file tokenizer.json --workers 8

Reads .jsonl, .txt and .dat files, also as .gz, .bz2, .xz and (with the package zstandard) .zst, tar and zip archives of
them, and directories. Writes `<output-prefix>_<key>_document.bin` and `.idx` for each key, and `.json` with their
metadata; `<output-prefix>_skipped.jsonl` lists lines without a document. Exit code 0, 1 for an error in the data or
while running, 2 for an error in the command. Flags may be spelt with underscores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.preprocess.document_types import PARSED, SPELT, WITHOUT_PATTERN, LabelledText, PlainText
from megatron.data.preprocess.encode import Recipe
from megatron.data.preprocess.input_shard import parse_shard
from megatron.data.preprocess.pipeline import Result, preprocess
from megatron.data.preprocess.progress_bar import ProgressLine
from megatron.data.preprocess.sentences import Sentences
from megatron.data.preprocess.text_files import find_text_files
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from megatron.registry import TOKENIZERS
from megatron.tokenizer_info import TokenizerInfo, describe_tokenizer
from megatron.tokenizers import Tokenizer, make_tokenizer
from megatron.tokenizers.round_trip import notes


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(
        description="Tokenise text into the token files of training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text = result.add_argument_group("text")
    text.add_argument("--input", required=True, help="files or directories, with commas between them")
    text.add_argument(
        "--jsonl-keys",
        "--json-keys",
        nargs="+",
        default=["text"],
        help="fields of a JSON line (commas or spaces between); each gets its own files, of the same documents: "
        "one with an empty field is left out of all",
    )
    text.add_argument("--num-docs", type=int, help="how many documents there are, for the time left")
    text.add_argument("--ftfy", action="store_true", help="repair broken Unicode with the package ftfy")
    text.add_argument("--split-sentences", action="store_true", help="make each sentence an item of its document")
    text.add_argument("--keep-newlines", action="store_true", help="keep white space between sentences")
    tokens = result.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", "--tokenizer", required=True, help=f"one of {', '.join(TOKENIZERS.names)}")
    tokens.add_argument("--vocab-file", help="the tokenizer's file: tokenizer.json for HFTokenizer")
    tokens.add_argument("--merge-file", help="the merges, where the tokenizer has them in a file of their own")
    tokens.add_argument("--tokenizer-name-or-path", help="the folder or public name of PretrainedFromHF")
    tokens.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    tokens.add_argument(
        "--mask-before-token", help="token ids with commas: no loss up to their first occurrence; writes labels as well"
    )
    tokens.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="special tokens that a text spells become their ids; otherwise they are plain text",
    )
    add_work_arguments(result)
    return result


def add_work_arguments(result: argparse.ArgumentParser) -> None:
    """Adds the flags of output and processing."""
    output = result.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, help="start of the files' paths")
    output.add_argument(
        "--dataset-impl",
        choices=["lazy", "cached", "mmap"],
        default="mmap",
        help="format: lazy and cached are the legacy one",
    )
    work = result.add_argument_group("work")
    work.add_argument("--workers", type=int, default=1, help="processes; the files are the same for any number")
    work.add_argument("--log-interval", type=int, default=100, help="documents between two progress lines at least")
    work.add_argument(
        "--on-error",
        choices=["skip", "fail"],
        default="skip",
        help="a line that is no document, or a damaged file: leave it out, count and list it, or end the work",
    )
    work.add_argument("--strict", action="store_const", const="fail", dest="on_error", help="as --on-error fail")
    work.add_argument("--resume", action="store_true", help="go on where an interrupted work stopped")
    work.add_argument("--shard", metavar="I/N", help="only this part of the input; tools/merge_datasets.py joins all N")


def recipe_of(args: argparse.Namespace, tokenizer: Tokenizer) -> Recipe:
    """Returns the document type. Raises ConfigError."""
    keys = tuple(key for group in args.jsonl_keys for key in group.split(",") if key)
    if args.keep_newlines and not args.split_sentences:
        raise ConfigError.of(
            "it is about white space between sentences, and none are split",
            key="keep_newlines",
            value=True,
            hint="add --split-sentences; without it every document keeps its newlines",
        )
    special = (tuple(tokenizer.special_tokens), args.parse_special_tokens)
    if args.mask_before_token is None:
        sentences = Sentences(args.keep_newlines) if args.split_sentences else None
        return PlainText(tokenizer, keys, args.append_eod, args.ftfy, sentences, *special)
    if args.split_sentences or len(keys) != 1:
        raise ConfigError.of(
            "labels are written for one key and unsplit documents",
            key="mask_before_token",
            value=args.mask_before_token,
            hint="name one key, and leave out --split-sentences",
        )
    pattern = _ids(args.mask_before_token, tokenizer.vocab_size)
    return LabelledText(tokenizer, pattern, keys, args.append_eod, args.ftfy, *special)


def _ids(text: str, vocab_size: int) -> tuple[int, ...]:
    try:
        found = tuple(int(token) for token in text.split(","))
    except ValueError as error:
        hint = "give numbers with commas between them, such as 1,518"
        raise ConfigError.of("these are not token ids", key="mask_before_token", value=text, hint=hint) from error
    if not 0 <= min(found) <= max(found) < vocab_size:
        what = f"the ids of this tokenizer are 0 to {vocab_size - 1}"
        hint = "give the ids that this tokenizer has for the words"
        raise ConfigError.of(what, key="mask_before_token", value=text, hint=hint)
    return found


def run_recipe(args: argparse.Namespace, recipe: Recipe, facts: TokenizerInfo) -> Result:
    """Writes the token files. Raises ConfigError and RunError."""
    files = find_text_files(name for name in args.input.split(",") if name)
    line = ProgressLine(every=args.log_interval, known_documents=args.num_docs)
    try:
        return preprocess(
            files,
            recipe,
            output_prefix=args.output_prefix,
            facts=facts,
            workers=args.workers,
            strict=args.on_error == "fail",
            resume=args.resume,
            shard=parse_shard(args.shard) if args.shard else None,
            legacy=args.dataset_impl != "mmap",
            report=line,
        )
    finally:
        line.close()


def run(args: argparse.Namespace) -> Result:
    """Runs the command line. Raises ConfigError and RunError."""
    vocab_file = args.vocab_file or args.tokenizer_name_or_path
    tokenizer = make_tokenizer(args.tokenizer_type, vocab_file=vocab_file, merge_file=args.merge_file)
    print(f"{args.tokenizer_type}: {tokenizer.vocab_size:,} tokens; encoding runs on {tokenizer.engine}", flush=True)
    print_round_trip_losses(tokenizer)
    facts = describe_tokenizer(args.tokenizer_type, tokenizer, append_eod=args.append_eod)
    return run_recipe(args, recipe_of(args, tokenizer), facts)


def print_round_trip_losses(tokenizer: Tokenizer) -> None:
    """Prints what decoding does not restore, and other notes about how texts are read, if any."""
    for line in notes(tokenizer):
        print(line, flush=True)


def _notes(result: Result) -> list[str]:
    """Returns notes about the written documents."""
    documents = result.outputs[0].card.documents
    lines = []
    if without := result.notes.get(WITHOUT_PATTERN):
        count = "none" if without == documents else f"{documents - without:,}"
        what = f"{count} of the {documents:,} documents hold the tokens of --mask-before-token"
        lines.append(f"{what}; of the {without:,} others every token carries a loss")
    if spelt := result.notes.get(SPELT):
        lines.append(f"{spelt:,} documents {SPELT}; --parse-special-tokens makes ids of them")
    if parsed := result.notes.get(PARSED):
        lines.append(f"{parsed:,} documents {PARSED}")
    reported = (WITHOUT_PATTERN, SPELT, PARSED)
    lines += [f"{count:,} documents {what}" for what, count in sorted(result.notes.items()) if what not in reported]
    return lines


def format_result(result: Result) -> str:
    """Formats what was written and what was skipped."""
    lines = [
        f"{written.prefix}.bin and .idx: {written.card.documents:,} documents, {written.card.tokens:,} tokens, "
        f"{written.card.bytes_per_token:.3f} bytes a token"
        for written in result.outputs
    ]
    working = max(result.seconds - result.starting, 1e-9)
    speed = result.content_bytes / 1e6 / working
    lines.append(
        f"{result.content_bytes:,} bytes read in {result.seconds:.1f} s "
        f"({speed:.1f} MB/s after the {result.starting:.1f} s until the first block was there)"
    )
    lines += _notes(result)
    if result.empty:
        lines.append(f"{result.empty:,} documents without text left out")
    if result.skipped.total:
        lines += [str(result.skipped), *(f"  {example}" for example in result.skipped.examples)]
        lines.append(f"all of them: {result.sidecar}")
    return "\n".join(lines)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with dashes in place of underscores in flags."""
    found = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        found.append((flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(with_dashes(sys.argv[1:] if arguments is None else arguments))
    try:
        print(format_result(run(args)))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
