#!/usr/bin/env python
"""Converts a checkpoint to a folder that `transformers` loads with AutoModelForCausalLM.

    python tools/convert_to_hf.py --input-dir checkpoints/my-model --output-dir my-model-hf

The model's family (such as GPT-NeoX, LLaMA or Mixtral) follows from its configuration, which is in the checkpoint;
for a checkpoint of another program give its YAML files with --config-file. What the family cannot express is refused,
naming the key. Any layout is read; the memory needed is about one layer. Flags may be spelt with dashes or underscores.

LoRA adapters are merged into the weights. With --adapter-only the adapters or the soft prompt are written to a folder
that `peft` loads on top of the frozen model, with what `modules_to_save` trained and, then, the tokenizer.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    gc.disable()  # the imports leave no garbage, and looking for it takes a sixth of the time of a small model

from megatron.adapter_config import low_rank
from megatron.checkpoint.format import files
from megatron.checkpoint.huggingface.export_model import PRECISIONS, ExportOptions, export, vocabulary
from megatron.checkpoint.huggingface.families import FAMILIES
from megatron.checkpoint.huggingface.family import Settings
from megatron.checkpoint.huggingface.generation_config import (
    GENERATION,
    facts_of_tokenizer,
    ids_for_config,
    write_generation,
)
from megatron.checkpoint.huggingface.import_model import TOKENIZER
from megatron.checkpoint.huggingface.peft_adapter import export_adapter
from megatron.checkpoint.huggingface.target_folder import refuse_adapter_files, refuse_model_files
from megatron.checkpoint.huggingface.tokenizer_files import TOKENIZER_FILE, copy_tokenizer, for_every_release
from megatron.checkpoint.load.stored_model import StoredModel, open_model
from megatron.errors import ConfigError, RunError
from megatron.tokenizer_info import TokenizerInfo
from megatron.tokenizers.from_folder import find_tokenizer
from megatron.tokenizers.to_folder import Portable, portable, portable_of


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(description="Convert a checkpoint for transformers.")
    result.add_argument("--input-dir", "--input_dir", type=Path, required=True, help="a save folder or one checkpoint")
    result.add_argument("--output-dir", "--output_dir", type=Path, required=True, help="the folder to write")
    result.add_argument("--iteration", type=int, help="checkpoint to take (default: the latest)")
    result.add_argument(
        "--config-file", "--config_file", type=Path, nargs="+", default=[], help="YAML files that describe the model"
    )
    result.add_argument(
        "--precision", choices=["auto", *PRECISIONS], default="auto", help="default: the one that is stored"
    )
    result.add_argument("--architecture", choices=list(FAMILIES), help="default: the first that can express the model")
    result.add_argument(
        "--max-shard-size", "--max_shard_size", type=float, default=5.0, help="largest file [GiB] (default: 5)"
    )
    result.add_argument("--tokenizer", type=Path, help="a tokenizer.json, a .model, or a folder of tokenizer files")
    result.add_argument(
        "--adapter-only",
        "--adapter_only",
        action="store_true",
        help="write LoRA adapters or a soft prompt as a folder of peft, without the model",
    )
    result.add_argument(
        "--base-model", "--base_model", help="with --adapter-only: the frozen model's folder or name in transformers"
    )
    result.add_argument(
        "--zero-biases",
        "--zero_biases",
        action="store_true",
        help="write attention biases of 0 where the model has none, which changes nothing and some programs need",
    )
    result.add_argument(
        "--own-head",
        "--own_head",
        action="store_true",
        help="write the output layer as a matrix of its own where it is the embedding, which some programs need",
    )
    result.add_argument("--no-save-tokenizer", "--no_save_tokenizer", action="store_true", help="write the model only")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        if args.adapter_only:
            refuse_adapter_files(args.output_dir)
        else:
            refuse_model_files(args.output_dir, tokenizer=not args.no_save_tokenizer)
        stored = open_model(args.input_dir, iteration=args.iteration, config_files=args.config_file)
        if args.adapter_only:
            return _adapter(args, stored)
        tokenizer = _tokenizer(args, stored)
        tokens = facts_of_tokenizer(stored.directory).get("vocab_size")
        tokens = tokens if tokenizer is None else tokenizer.vocab_size
        special = _special(stored, tokenizer, tokens, _stored_generation(tokenizer))
        made = export(
            stored,
            args.output_dir,
            family_name=args.architecture,
            precision=args.precision,
            largest_file=int(args.max_shard_size * (1 << 30)),
            special=special,
            tokens=tokens,
            options=ExportOptions(args.zero_biases, args.own_head),
        )
        if not args.no_save_tokenizer:
            _save_tokenizer(tokenizer, args.output_dir, stored.model.max_position_embeddings)
        write_generation(args.output_dir, special)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(RunError.of(f"cannot be read or written: {error.strerror}", location=error.filename), file=sys.stderr)
        return RunError.exit_code
    print(
        f"{args.output_dir}: {made.architecture}, {made.tensors} tensors, {made.size:,} bytes, "
        f"vocabulary {made.rows:,}, from {stored.directory}"
    )
    return 0


def _adapter(args: argparse.Namespace, stored: StoredModel) -> int:
    adapter = low_rank(stored.model.lora)
    if adapter is not None and adapter.modules_to_save:
        refuse_adapter_files(args.output_dir, tokenizer=not args.no_save_tokenizer)
    tokenizer = None if args.tokenizer is None else _tokenizer(args, stored)
    tokens = facts_of_tokenizer(stored.directory).get("vocab_size")
    made = export_adapter(
        stored,
        args.output_dir,
        family_name=args.architecture,
        precision=args.precision,
        base_model=args.base_model,
        tokens=tokens if tokenizer is None else tokenizer.vocab_size,
    )
    if made.has_embedding and not args.no_save_tokenizer:
        _save_tokenizer(tokenizer or _tokenizer(args, stored), args.output_dir, stored.model.max_position_embeddings)
    print(
        f"{args.output_dir}: {made.architecture}, {made.tensors} tensors, {made.size:,} bytes, from {stored.directory}"
    )
    if made.rows_added:
        what = f"the embedding here has {made.rows:,} rows; before PeftModel.from_pretrained call"
        print(f"{what} resize_token_embeddings({made.rows}) of the base model, unless it has as many")
    return 0


def _tokenizer(args: argparse.Namespace, stored: StoredModel) -> Portable | None:
    """Returns the tokenizer of --tokenizer, else the run's; None, with a printed line, if it cannot be read.

    Raises ConfigError for an invalid --tokenizer, and for one with more tokens than the model has rows. The model's own
    may have more, as in some published folders.
    """
    found = _found_tokenizer(args, stored)
    if found is None or found.info is None or args.tokenizer is None:
        return found
    facts = facts_of_tokenizer(stored.directory)
    known = TokenizerInfo.of_checkpoint(facts) if facts else None
    if known is not None and not known.agrees_with(found.info):
        print(f"the model was trained with {known}; the tokenizer that is written is {found.info}", file=sys.stderr)
    if found.vocab_size > stored.rows:
        raise ConfigError.of(
            f"the model has {stored.rows:,} rows, and this is {found.info}: transformers would look up rows that do "
            "not exist",
            key="tokenizer",
            value=str(args.tokenizer),
            hint="leave --tokenizer out where the run's tokenizer is found, else give that one",
        )
    return found


def _found_tokenizer(args: argparse.Namespace, stored: StoredModel) -> Portable | None:
    if args.tokenizer is not None:
        return portable_of(args.tokenizer)
    section = stored.tokenizer
    beside = stored.directory.parent / TOKENIZER
    try:
        return portable(section.tokenizer_type, section.vocab_file, section.merge_file)
    except ConfigError as error:
        if beside.is_dir() and find_tokenizer(beside).keys:
            return portable_of(beside)
        if not args.no_save_tokenizer:
            reason = error if section.vocab_file else "no tokenizer file is known"
            print(f"{reason}; none was written, give one with --tokenizer", file=sys.stderr)
    return None


def _special(
    stored: StoredModel, tokenizer: Portable | None, tokens: int | None, stored_ids: dict[str, Any]
) -> Settings:
    """Returns the token ids of config.json: those of the original folder, and the run's end-of-document token."""
    facts = facts_of_tokenizer(stored.directory)
    own = facts.get("eod") if tokenizer is None else tokenizer.end
    args = stored.generation.eos_token_ids or ()
    ends = [*args, *([] if own is None else [int(own)])]
    begin = None if tokenizer is None else tokenizer.begin
    ids = ids_for_config(stored_ids, ends=ends, begin=begin, vocabulary=vocabulary(stored, tokens))
    if ids["eos_token_id"] is None:
        print("the end-of-text token is not known, so eos_token_id is null; give --tokenizer", file=sys.stderr)
    return ids


def _stored_generation(tokenizer: Portable | None) -> dict[str, Any]:
    """Reads the generation settings in the tokenizer's folder."""
    folder = None if tokenizer is None else tokenizer.folder
    path = None if folder is None else folder / GENERATION
    return dict(files.read_json(path)) if path is not None and path.is_file() else {}


def _save_tokenizer(tokenizer: Portable | None, output: Path, length: int | None) -> None:
    """Writes the tokenizer's folder, or its files with the metadata of transformers."""
    if tokenizer is None:
        return
    if tokenizer.folder is not None:
        copy_tokenizer(tokenizer.folder, output)
    tokenizer.write(output, length)
    for_every_release(output, own=tokenizer.folder is None or not (tokenizer.folder / TOKENIZER_FILE).is_file())
    if tokenizer.lost:
        print(f"{tokenizer.lost}; their names stay beside the .model, where transformers adds them", file=sys.stderr)
    if not tokenizer.readable:
        print("no other program reads this kind of tokenizer, so none was written", file=sys.stderr)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main())
