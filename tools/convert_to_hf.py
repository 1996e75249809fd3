#!/usr/bin/env python
"""Turns a checkpoint into a folder that `transformers` loads with AutoModelForCausalLM.

    python tools/convert_to_hf.py --input-dir checkpoints/my-model --output-dir my-model-hf

The model's family (such as GPT-NeoX, LLaMA or Mixtral) follows from its configuration, which stands in the checkpoint;
for a checkpoint of another program give its YAML files with --config-file. What the family cannot express is refused,
naming the key. Any layout is read; the memory needed is about one layer. Flags may be spelt with dashes or underscores.

Low-rank updates (`lora`) are merged into the weights. With --adapter-only what was trained beside the frozen model, the
updates or a soft prompt, becomes a folder of its own that `peft` loads on top of that model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint.huggingface.adopt import copy_tokenizer
from megatron.checkpoint.huggingface.export import PRECISIONS, export, refuse_existing
from megatron.checkpoint.huggingface.families import FAMILIES
from megatron.checkpoint.huggingface.peft import export_adapter
from megatron.checkpoint.stored import StoredModel, open_model
from megatron.errors import ConfigError, RunError

END_OF_DOCUMENT = "<|endoftext|>"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Convert a checkpoint for transformers.")
    made.add_argument("--input-dir", "--input_dir", type=Path, required=True, help="a save folder or one checkpoint")
    made.add_argument("--output-dir", "--output_dir", type=Path, required=True, help="the folder to write")
    made.add_argument("--iteration", type=int, help="checkpoint to take (default: the latest)")
    made.add_argument(
        "--config-file", "--config_file", type=Path, nargs="+", default=[], help="YAML files that describe the model"
    )
    made.add_argument(
        "--precision", choices=["auto", *PRECISIONS], default="auto", help="default: the one that is stored"
    )
    made.add_argument("--architecture", choices=list(FAMILIES), help="default: the first that can express the model")
    made.add_argument(
        "--max-shard-size", "--max_shard_size", type=float, default=5.0, help="largest file [GiB] (default: 5)"
    )
    made.add_argument("--tokenizer", type=Path, help="a tokenizer.json, or a folder of tokenizer files, to copy")
    made.add_argument(
        "--adapter-only",
        "--adapter_only",
        action="store_true",
        help="write low-rank updates or a soft prompt as a folder of peft, without the model",
    )
    made.add_argument(
        "--base-model", "--base_model", help="with --adapter-only: the frozen model's folder or name in transformers"
    )
    made.add_argument("--no-save-tokenizer", "--no_save_tokenizer", action="store_true", help="write the model only")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    asked = parser().parse_args(arguments)
    try:
        refuse_existing(asked.output_dir)
        stored = open_model(asked.input_dir, iteration=asked.iteration, config_files=asked.config_file)
        if asked.adapter_only:
            return _adapter(asked, stored)
        source = asked.tokenizer or _known(stored.tokenizer.vocab_file)
        made = export(
            stored,
            asked.output_dir,
            family_name=asked.architecture,
            precision=asked.precision,
            largest_file=int(asked.max_shard_size * (1 << 30)),
            special=_special(source),
        )
        if not asked.no_save_tokenizer:
            _save_tokenizer(source, asked.output_dir, stored.model.max_position_embeddings)
    except (ConfigError, RunError) as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    print(
        f"{asked.output_dir}: {made.architecture}, {made.tensors} tensors, {made.size:,} bytes, "
        f"vocabulary {made.rows:,}, from {stored.directory}"
    )
    return 0


def _adapter(asked: argparse.Namespace, stored: StoredModel) -> int:
    chosen = {"family_name": asked.architecture, "precision": asked.precision, "base_model": asked.base_model}
    made = export_adapter(stored, asked.output_dir, **chosen)
    print(
        f"{asked.output_dir}: {made.architecture}, {made.tensors} tensors, {made.size:,} bytes, from {stored.directory}"
    )
    return 0


def _known(vocab_file: str | None) -> Path | None:
    """The tokenizer that the configuration names, where it is a file of the tokenizers library."""
    path = Path(vocab_file) if vocab_file else None
    return path if path is not None and path.suffix == ".json" and path.is_file() else None


def _special(source: Path | None) -> dict[str, int]:
    """The ids for config.json: what the tokenizer's own folder says, else the end of a document."""
    if source is None:
        return {}
    folder = source if source.is_dir() else source.parent
    kept = folder / "generation_config.json"
    if kept.is_file():
        said = json.loads(kept.read_text(encoding="utf-8"))
        return {key: said[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in said}
    end = None if source.is_dir() else _id(source, END_OF_DOCUMENT)
    return {} if end is None else {"bos_token_id": end, "eos_token_id": end}


def _id(tokenizer: Path, token: str) -> int | None:
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    vocabulary = content.get("model", {}).get("vocab", {})
    found = added.get(token, vocabulary.get(token) if isinstance(vocabulary, dict) else None)
    return None if found is None else int(found)


def _save_tokenizer(source: Path | None, output: Path, length: int | None) -> None:
    """The tokenizer's folder as it is, or its file with what transformers wants to know beside it."""
    if source is None:
        print("no tokenizer file is known, so none was copied; give one with --tokenizer", file=sys.stderr)
        return
    folder = source if source.is_dir() else source.parent
    if (folder / "tokenizer_config.json").is_file():
        copy_tokenizer(folder, output)
        return
    (output / "tokenizer.json").write_bytes(source.read_bytes())
    end = _id(source, END_OF_DOCUMENT)
    names = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_DOCUMENT)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, **names}
    (output / "tokenizer_config.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    if end is not None:
        said = {"bos_token_id": end, "eos_token_id": end}
        (output / "generation_config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
