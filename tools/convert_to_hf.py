#!/usr/bin/env python
"""Converts a checkpoint to a folder that `transformers` loads with AutoModelForCausalLM.

    python tools/convert_to_hf.py --input-dir checkpoints/my-model --output-dir my-model-hf

The model's family (such as GPT-NeoX, LLaMA or Mixtral) follows from its configuration, which is in the checkpoint;
for a checkpoint of another program give its YAML files with --config-file. What the family cannot express is refused,
naming the key. Any layout is read; the memory needed is about one layer. Flags may be spelt with dashes or underscores.

LoRA adapters are merged into the weights. With --adapter-only the adapters or the soft prompt are written to a folder
that `peft` loads on top of the frozen model, with what `modules_to_save` trained and, then, the tokenizer.

A model that embeds queries and passages becomes two folders, <output>/question_encoder and <output>/context_encoder.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    gc.disable()  # the imports leave no garbage, and looking for it takes a sixth of the time of a small model

from megatron.adapter_config import low_rank
from megatron.checkpoint.huggingface.export_model import PRECISIONS, ExportOptions
from megatron.checkpoint.huggingface.families import FAMILIES
from megatron.checkpoint.huggingface.generation_config import facts_of_tokenizer
from megatron.checkpoint.huggingface.peft_adapter import export_adapter
from megatron.checkpoint.huggingface.target_folder import refuse_adapter_files, refuse_model_files
from megatron.checkpoint.load.stored_model import StoredModel, open_model
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from megatron.training.huggingface_folder import FolderOptions, run_tokenizer, save_tokenizer, write_folder


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
        made = write_folder(stored, args.output_dir, _warn, _options(args))
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
    tokenizer = None if args.tokenizer is None else run_tokenizer(stored, _warn, _options(args))
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
        tokenizer = tokenizer or run_tokenizer(stored, _warn, _options(args))
        save_tokenizer(tokenizer, args.output_dir, stored.model.max_position_embeddings, _warn)
    print(
        f"{args.output_dir}: {made.architecture}, {made.tensors} tensors, {made.size:,} bytes, from {stored.directory}"
    )
    if made.rows_added:
        what = f"the embedding here has {made.rows:,} rows; before PeftModel.from_pretrained call"
        print(f"{what} resize_token_embeddings({made.rows}) of the base model, unless it has as many")
    return 0


def _options(args: argparse.Namespace) -> FolderOptions:
    return FolderOptions(
        family=args.architecture,
        precision=args.precision,
        largest_file=int(args.max_shard_size * (1 << 30)),
        tokenizer=args.tokenizer,
        with_tokenizer=not args.no_save_tokenizer,
        export=ExportOptions(args.zero_biases, args.own_head),
    )


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(run_tool(main))
