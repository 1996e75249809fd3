#!/usr/bin/env python
"""Turns a folder of `transformers` into a checkpoint and the YAML that describes its model.

    python tools/convert_from_hf.py --input-dir pythia-70m --output-dir checkpoints/pythia-70m

Writes <output>/global_step0, <output>/latest, <output>/model.yml and <output>/tokenizer/. To train on:
`./deepy.py train.py <output>/model.yml my-training.yml --load <output> --finetune true`. Any run reads it, whatever its
layout; --target-... only decide how the files are cut. What has no place in a model here is refused, and so is every
tensor that is left over. Flags may be spelt with dashes or underscores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from megatron.checkpoint import layout
from megatron.checkpoint.huggingface.adopt import TOKENIZER, adopt, copy_tokenizer
from megatron.checkpoint.huggingface.export import PRECISIONS
from megatron.checkpoint.huggingface.folder import Folder
from megatron.errors import ConfigError, RunError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Convert a model of transformers.")
    made.add_argument("--input-dir", "--input_dir", type=Path, required=True, help="a folder that transformers wrote")
    made.add_argument("--output-dir", "--output_dir", type=Path, required=True, help="the save folder to write")
    made.add_argument(
        "--target-tensor-parallel-size", "--target_tensor_parallel_size", type=int, default=1, help="default: 1"
    )
    made.add_argument(
        "--target-pipeline-parallel-size",
        "--target_pipeline_parallel_size",
        type=int,
        default=0,
        help="0 keeps all layers in one file a rank, more keeps a file a layer (default: 0)",
    )
    made.add_argument(
        "--precision", choices=["auto", *PRECISIONS], default="auto", help="default: the one that is stored"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    asked = parser().parse_args(arguments)
    output = asked.output_dir
    try:
        if layout.iterations(output):
            raise RunError.of("the folder already holds checkpoints", where=str(output), remedy="give a new one")
        folder = Folder.open(asked.input_dir)
        tokenizer = _tokenizer(asked.input_dir, output / TOKENIZER)
        made = adopt(
            folder,
            output,
            model_size=asked.target_tensor_parallel_size,
            pipe_size=asked.target_pipeline_parallel_size,
            dtype=PRECISIONS.get(asked.precision),
            further=tokenizer,
        )
    except (ConfigError, RunError) as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    told = {**made.settings, **tokenizer}
    (output / "model.yml").write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    print(f"{made.directory}: {made.tensors} tensors, vocabulary {made.rows:,}; its keys are in {output / 'model.yml'}")
    return 0


def _tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copies the tokenizer's files; the keys that name it."""
    names = copy_tokenizer(source, target)
    if "tokenizer.json" in names:
        return {"tokenizer_type": "HFTokenizer", "vocab_file": str((target / "tokenizer.json").resolve())}
    return {}


if __name__ == "__main__":
    sys.exit(main())
