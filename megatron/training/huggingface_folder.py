"""A checkpoint as a whole folder of `transformers`: weights, config.json, the tokenizer's files, generation settings.

`tools/convert_to_hf.py` is its command line. A run with `save_hf_every` starts it as a program for its checkpoints:

    python -m megatron.training.huggingface_folder CHECKPOINT FOLDER
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.format import files
from megatron.checkpoint.huggingface.encoder_pair import PAIR
from megatron.checkpoint.huggingface.export_model import PLAIN, Exported, ExportOptions, export, vocabulary
from megatron.checkpoint.huggingface.families import family_for
from megatron.checkpoint.huggingface.family import Settings
from megatron.checkpoint.huggingface.fold_mup import fold_misfits
from megatron.checkpoint.huggingface.forced_tokenizers import other_ids
from megatron.checkpoint.huggingface.generation_config import (
    GENERATION,
    facts_of_tokenizer,
    ids_for_config,
    write_generation,
)
from megatron.checkpoint.huggingface.import_model import TOKENIZER
from megatron.checkpoint.huggingface.target_folder import refuse_model_files
from megatron.checkpoint.huggingface.tokenizer_files import TOKENIZER_FILE, copy_tokenizer, for_every_release
from megatron.checkpoint.load.stored_model import StoredModel, open_model
from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.config.schema.mup import MupSection
from megatron.errors import ConfigError, RunError
from megatron.registry import RETRIEVAL_HEAD
from megatron.tokenizer_info import TokenizerInfo
from megatron.tokenizers.builder import build_tokenizer
from megatron.tokenizers.from_folder import find_tokenizer
from megatron.tokenizers.masking import span_tokens
from megatron.tokenizers.to_folder import Portable, portable, portable_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class FolderOptions:
    """What is written, and how."""

    family: str | None = None
    """Name of the model's family; None for the first that can express the model."""
    precision: str = "auto"
    """Precision of the weights; auto keeps the stored one."""
    largest_file: int = 5 << 30
    """Largest file of weights [bytes]."""
    tokenizer: Path | None = None
    """Tokenizer to write: a file or a folder; None for the run's."""
    with_tokenizer: bool = True
    """True if the tokenizer's files are written."""
    export: ExportOptions = PLAIN
    """What changes no result and some programs need."""


DEFAULTS = FolderOptions()


def check_family(
    model: ModelSection, moe: MoeSection, mixers: MixersSection, mup: MupSection, preferred: str | None = None
) -> None:
    """Raises ConfigError naming each key that no family can express.

    Args:
        model: Section of the model.
        moe: Section of experts.
        mixers: Section of blocks without attention.
        mup: Section of muP.
        preferred: Name of the family to try first.
    """
    ConfigError.raise_any(fold_misfits(mup, model))
    family_for(model, moe, mixers, None, preferred)


def write_folder(stored: StoredModel, output: Path, say: Say, options: FolderOptions = DEFAULTS) -> Exported:
    """Writes the folder, or two in it where the model embeds queries and passages; returns what was written.

    Raises ConfigError for a model that no family can express and for a tokenizer that cannot be the model's.

    Args:
        stored: The checkpoint.
        output: The folder to write.
        say: Prints a line about what is not known or not written.
        options: What is written.
    """
    if stored.model.lm_head == RETRIEVAL_HEAD:
        folders = [output / name for name in PAIR]
        for folder in folders:
            refuse_model_files(folder, tokenizer=options.with_tokenizer)
        made, passages = (_write_one(stored, folder, say, options, tower) for tower, folder in enumerate(folders))
        classes = f"{made.architecture} and {passages.architecture}"
        return replace(
            made, architecture=classes, tensors=made.tensors + passages.tensors, size=made.size + passages.size
        )
    return _write_one(stored, output, say, options)


def _write_one(stored: StoredModel, output: Path, say: Say, options: FolderOptions, tower: int = 0) -> Exported:
    tokenizer = run_tokenizer(stored, say, options)
    tokens = facts_of_tokenizer(stored.directory).get("vocab_size")
    tokens = tokens if tokenizer is None else tokenizer.vocab_size
    special = _special(stored, tokenizer, tokens, say)
    made = export(
        stored,
        output,
        family_name=options.family,
        precision=options.precision,
        largest_file=options.largest_file,
        special=special,
        tokens=tokens,
        options=options.export,
        tower=tower,
    )
    if options.with_tokenizer:
        save_tokenizer(tokenizer, output, stored.model.max_position_embeddings, say)
        line = other_ids(output)
        if line is not None:
            say(line)
    write_generation(output, special)
    return made


def run_tokenizer(stored: StoredModel, say: Say, options: FolderOptions = DEFAULTS) -> Portable | None:
    """Returns the tokenizer that is asked for, else the run's; None, with a line, if it cannot be read.

    Raises ConfigError for an invalid one that is asked for, and for one with more tokens than the model has rows. The
    model's own may have more, as in some published folders.

    Args:
        stored: The checkpoint.
        say: Prints a line.
        options: Names the tokenizer.
    """
    found = _found_tokenizer(stored, say, options)
    if found is None or found.info is None or options.tokenizer is None:
        return found
    facts = facts_of_tokenizer(stored.directory)
    known = TokenizerInfo.of_checkpoint(facts) if facts else None
    if known is not None and not known.agrees_with(found.info):
        say(f"the model was trained with {known}; the tokenizer that is written is {found.info}")
    if found.vocab_size > stored.rows:
        raise ConfigError.of(
            f"the model has {stored.rows:,} rows, and this is {found.info}: transformers would look up rows that do "
            "not exist",
            key="tokenizer",
            value=str(options.tokenizer),
            hint="leave --tokenizer out where the run's tokenizer is found, else give that one",
        )
    return found


def save_tokenizer(tokenizer: Portable | None, output: Path, length: int | None, say: Say) -> None:
    """Writes the tokenizer's folder, or its files with the metadata of transformers.

    Args:
        tokenizer: The tokenizer; None writes nothing.
        output: The folder to write.
        length: Longest sequence of the model [tokens].
        say: Prints a line about what is lost.
    """
    if tokenizer is None:
        return
    if tokenizer.folder is not None:
        copy_tokenizer(tokenizer.folder, output)
    tokenizer.write(output, length)
    for_every_release(output, own=tokenizer.folder is None or not (tokenizer.folder / TOKENIZER_FILE).is_file())
    if tokenizer.otherwise is not None:
        say(
            f"AutoTokenizer of transformers gives other ids than sentencepiece, which this model was trained with, for "
            f"some texts, such as {tokenizer.otherwise!r}"
        )
    if tokenizer.lost:
        say(f"{tokenizer.lost}; their names stay beside the .model, where transformers adds them")
    if not tokenizer.readable:
        say("no other program reads this kind of tokenizer, so none was written")


def _found_tokenizer(stored: StoredModel, say: Say, options: FolderOptions) -> Portable | None:
    if options.tokenizer is not None:
        return portable_of(options.tokenizer)
    section = stored.tokenizer
    beside = stored.directory.parent / TOKENIZER
    try:
        return portable(section.tokenizer_type, section.vocab_file, section.merge_file)
    except ConfigError as error:
        if beside.is_dir() and find_tokenizer(beside).keys:
            return portable_of(beside)
        if options.with_tokenizer:
            reason = error if section.vocab_file else "no tokenizer file is known"
            say(f"{reason}; none was written, give one with --tokenizer")
    return None


def _special(stored: StoredModel, tokenizer: Portable | None, tokens: int | None, say: Say) -> Settings:
    """Returns the token ids of config.json: those of the original folder, and the run's end-of-document token."""
    facts = facts_of_tokenizer(stored.directory)
    own = facts.get("eod") if tokenizer is None else tokenizer.end
    args = stored.generation.eos_token_ids or ()
    ends = [*args, *([] if own is None else [int(own)])]
    begin = None if tokenizer is None else tokenizer.begin
    stored_ids = _stored_generation(tokenizer)
    ids = ids_for_config(stored_ids, ends=ends, begin=begin, vocabulary=vocabulary(stored, tokens))
    if ids["eos_token_id"] is None:
        say("the end-of-text token is not known, so eos_token_id is null; give --tokenizer")
    if stored.model.encoder_num_layers is not None:
        return {**ids, **_of_decoder(stored, say)}
    if stored.model.lm_head != RETRIEVAL_HEAD or tokenizer is None or tokenizer.pad is None:
        return ids
    return {**ids, "pad_token_id": tokenizer.pad}  # which the class hides where it is given no attention mask


def _of_decoder(stored: StoredModel, say: Say) -> Settings:
    """Returns the ids that a decoder starts with and ends with, where the run's tokenizer has them."""
    section = stored.tokenizer
    try:
        spans = span_tokens(build_tokenizer(section), 0)
    except ConfigError as error:
        say(f"the decoder starts with id 0 and ends with 1, as a T5's: {error}")
        return {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return {"decoder_start_token_id": spans.start, "pad_token_id": spans.words.pad, "eos_token_id": spans.end}


def _stored_generation(tokenizer: Portable | None) -> dict[str, Any]:
    """Reads the generation settings in the tokenizer's folder."""
    folder = None if tokenizer is None else tokenizer.folder
    path = None if folder is None else folder / GENERATION
    return dict(files.read_json(path)) if path is not None and path.is_file() else {}


def main(arguments: Sequence[str]) -> int:
    """Writes the folder of a checkpoint beside its name, then under it; returns the exit code."""
    checkpoint, target = map(Path, arguments)
    os.nice(10)  # training goes first
    partial = target.with_name(f"{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        write_folder(open_model(checkpoint), partial, lambda line: print(line, file=sys.stderr))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (ConfigError, RunError, OSError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", RunError.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
