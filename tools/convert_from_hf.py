#!/usr/bin/env python
r"""Converts a folder of `transformers` to a checkpoint and the YAML that describes its model.

    python tools/convert_from_hf.py --input-dir pythia-70m --output-dir checkpoints/pythia-70m

Writes <output>/global_step0, <output>/latest, <output>/model.yml and <output>/tokenizer/. To train on:
`./deepy.py train.py <output>/model.yml my-training.yml --load <output> --finetune true`. Runs of any layout read it;
--target-... only set the sharding of the files. Unsupported settings and tensors are rejected. Flags may be spelt with
dashes or underscores.

The two encoders of dense retrieval are one checkpoint:

    python tools/convert_from_hf.py --input-dir dpr-question_encoder --passage-dir dpr-ctx_encoder \
        --output-dir checkpoints/dpr
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    gc.disable()  # the imports leave no garbage, and looking for it takes a sixth of the time of a small model

import yaml

from megatron.checkpoint.format import layout
from megatron.checkpoint.huggingface.encoder_pair import missing_keys, open_folder, open_pair
from megatron.checkpoint.huggingface.export_model import PRECISIONS
from megatron.checkpoint.huggingface.generation_config import (
    GENERATION,
    IDS,
    end_ids,
    generation_of,
    sampling,
    unheeded,
    write_generation,
)
from megatron.checkpoint.huggingface.import_model import TOKENIZER, adopt
from megatron.checkpoint.huggingface.target_folder import refuse_other_tokenizer
from megatron.checkpoint.huggingface.tokenizer_files import TOKENIZER_FILE, copy_tokenizer
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from megatron.tokenizers.from_folder import find_tokenizer, require_same_tokenizer
from megatron.tokenizers.round_trip import reading_notes
from megatron.tokenizers.sentence_piece import SPMTokenizer
from megatron.tokenizers.sentence_piece_json import is_unigram
from megatron.tokenizers.tokenizer_classes import retain_class
from megatron.tokenizers.tokenizer_config import retain_reading, unapplied_cleanup

_OF_MODEL = (GENERATION, "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files that are copied with a tokenizer, and are the model's."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(description="Convert a model of transformers.")
    result.add_argument("--input-dir", "--input_dir", type=Path, required=True, help="a folder that transformers wrote")
    result.add_argument("--output-dir", "--output_dir", type=Path, required=True, help="the save folder to write")
    result.add_argument(
        "--target-tensor-parallel-size", "--target_tensor_parallel_size", type=int, default=1, help="default: 1"
    )
    result.add_argument(
        "--target-pipeline-parallel-size",
        "--target_pipeline_parallel_size",
        type=int,
        default=0,
        help="0 keeps all layers in one file a rank, more keeps a file a layer (default: 0)",
    )
    result.add_argument(
        "--mtp-num-layers",
        "--mtp_num_layers",
        type=int,
        help="modules behind the last block that predict further tokens, to be read too (default: none)",
    )
    result.add_argument(
        "--passage-dir",
        "--passage_dir",
        type=Path,
        help="the encoder of passages, where --input-dir is that of questions (model_type: dpr)",
    )
    result.add_argument(
        "--shared-encoder",
        "--shared_encoder",
        action="store_true",
        help="the encoder of --input-dir (model_type: dpr) reads queries and passages alike",
    )
    result.add_argument("--adapter", type=Path, help="a folder of peft whose low-rank updates become lora")
    result.add_argument(
        "--precision", choices=["auto", *PRECISIONS], default="auto", help="default: the one that is stored"
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(arguments)
    output = args.output_dir
    fresh = not (output / TOKENIZER).exists()
    try:
        if layout.iterations(output):
            raise RunError.of("the folder already holds checkpoints", location=str(output), hint="give a new one")
        folder = (
            open_folder(args.input_dir) if args.passage_dir is None else open_pair(args.input_dir, args.passage_dir)
        )
        given = missing_keys(folder, shared=args.shared_encoder)
        if folder.passages is not None:
            require_same_tokenizer(folder.path, folder.passages.path)
        source = _tokenizer_folder(folder.path, args.adapter)
        refuse_other_tokenizer(source, output / TOKENIZER)
        generation = generation_of(folder.path, folder.config)
        further = {**_tokenizer(source, folder.path, output / TOKENIZER, generation), **sampling(generation)}
        further |= {} if args.mtp_num_layers is None else {"mtp_num_layers": args.mtp_num_layers}
        made = adopt(
            folder,
            output,
            model_size=args.target_tensor_parallel_size,
            pipe_size=args.target_pipeline_parallel_size,
            dtype=PRECISIONS.get(args.precision),
            given=given,
            further=further,
            adapter=args.adapter,
        )
        settings = {**made.settings, **further}
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        (output / "model.yml").write_text(text, encoding="utf-8")
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        if fresh:
            shutil.rmtree(output / TOKENIZER, ignore_errors=True)  # the next attempt may be with another model
        return error.exit_code
    except OSError as error:
        print(RunError.of(f"cannot be read or written: {error.strerror}", location=error.filename), file=sys.stderr)
        return RunError.exit_code
    print(f"{made.directory}: {made.tensors} tensors, vocabulary {made.rows:,}; its keys are in {output / 'model.yml'}")
    return 0


def _tokenizer_folder(model: Path, adapter: Path | None) -> Path:
    """Returns where the tokenizer is: beside an adapter is the one that it was trained with, with added tokens."""
    return adapter if adapter is not None and (adapter / TOKENIZER_FILE).is_file() else model


def _tokenizer(source: Path, model: Path, target: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """Copies the tokenizer's files and returns the keys that name it. Prints what is not supported."""
    names = copy_tokenizer(source, target)
    for path in [each for pattern in _OF_MODEL for each in model.glob(pattern) if each.name not in names]:
        shutil.copyfile(path, target / path.name)  # the tokenizer may be that of an adapter
        names.append(path.name)
    retain_reading(source, target)
    retain_class(model, target)
    if GENERATION not in names:
        write_generation(target, {name: generation.get(name) for name in IDS})
    ends = end_ids(generation)
    found = find_tokenizer(target, ends, complete=True)
    if not found.keys:
        print(f"{found.reason}; give tokenizer_type and vocab_file yourself", file=sys.stderr)
    elif found.reason:
        print(found.reason, file=sys.stderr)
    for line in _notes(target):
        print(line, file=sys.stderr)
    for name in unheeded(generation):
        print(f"{GENERATION}: {name} has no key here, and does not change what is generated", file=sys.stderr)
    size = found.tokenizer.vocab_size if found.tokenizer else None
    known = [number for number in ends if size is None or number < size]
    if known != ends:
        beyond = sorted(set(ends) - set(known))
        print(f"eos_token_id: the tokenizer has no tokens {beyond}, at which no text ends here", file=sys.stderr)
    return {**found.keys, **({"eos_token_ids": known} if known else {})}


def _notes(target: Path) -> list[str]:
    """Lines about texts that transformers, sentencepiece and this program do not read or write alike."""
    cleanup = unapplied_cleanup(target)
    lines = [cleanup] if cleanup else []
    for path in sorted(target.glob("*.model")):
        try:
            tokenizer = SPMTokenizer(str(path))
        except ConfigError:
            continue  # another kind of file
        lines += reading_notes(tokenizer)
        if tokenizer.blank is not None and is_unigram(path) and not (target / TOKENIZER_FILE).is_file():
            lines.append(
                "transformers 5 reads this unigram .model by merges under LLaMA's class, with other ids; it is read by "
                "its scores here, as releases before 5 do, and exported so"
            )
    return lines


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(run_tool(main))
