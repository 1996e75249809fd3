"""Where prompts come from and where texts go: unconditional, a file of prompts, or a person at a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from megatron.errors import ConfigError, RunError
from megatron.inference.batch_generation import TextGenerator
from megatron.inference.generation_request import GenerationResult
from megatron.log import get_logger

UNCONDITIONAL, INPUT_FILE, INTERACTIVE = "unconditional", "input-file", "interactive"
PRECOMPUTE = "precompute"
_SHOWN = 5  # texts that a run over a file prints as well


def chosen_mode(text_gen_type: str | None, sample_input_file: str | None) -> str:
    """The mode that a configuration asks for; a prompt file asks for itself. Raises ConfigError for another name."""
    if text_gen_type is None:
        return UNCONDITIONAL if sample_input_file is None else INPUT_FILE
    if text_gen_type not in (UNCONDITIONAL, INPUT_FILE, INTERACTIVE, PRECOMPUTE):
        raise ConfigError.of(
            "there is no such mode",
            key="text_gen_type",
            value=text_gen_type,
            hint=f"choose {UNCONDITIONAL}, {INPUT_FILE}, {INTERACTIVE} or {PRECOMPUTE}",
        )
    return text_gen_type


def read_prompts(path: str | None, prompt_end: str) -> list[str]:
    """The prompts of a UTF-8 file: parted by `prompt_end`, without empty ones and white space around them.

    Raises ConfigError when the file cannot be read or holds no prompt.
    """
    if path is None:
        raise ConfigError.of("needs a file of prompts", key="sample_input_file", value=path, hint="give one with -i")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError.of(f"cannot read the prompts ({reason})", key="sample_input_file", value=path) from error
    parts = text.split(prompt_end) if prompt_end else [text]
    prompts = [part.strip() for part in parts if part.strip()]
    if not prompts:
        raise ConfigError.of(
            "the file holds no prompt", key="sample_input_file", value=path, hint=f"prompts end with {prompt_end!r}"
        )
    return prompts


def output_path(sample_output_file: str | None, sample_input_file: str | None) -> Path:
    """The file that records go to; without a name it is named after the prompts.

    Raises ConfigError where it is the file of the prompts, which would be lost.
    """
    both = [Path(each).resolve() for each in (sample_output_file, sample_input_file) if each is not None]
    if len(both) == 2 and both[0] == both[1]:
        what = "the texts would take the place of the prompts"
        raise ConfigError.of(what, key="sample_output_file", value=sample_output_file, hint="name another file")
    if sample_output_file is not None:
        return Path(sample_output_file)
    return Path(f"{sample_input_file}.output.jsonl" if sample_input_file is not None else "samples.jsonl")


def run_over(
    generator: TextGenerator, contexts: Sequence[str], path: Path, *, writes: bool, show: TextIO | None = None
) -> None:
    """Continues every context and writes a JSON line for each, in order, as they are done; an older file is replaced.

    Raises RunError when no context could be continued, or when the file cannot be written.

    Args:
        generator: The generator.
        contexts: The prompts.
        path: The output file, or None.
        writes: Whether this rank does so; all ranks take part in the model.
        show: Prints a result, or None.
    """
    failed: list[GenerationResult] = []
    count = 0
    write, close = _writer(path) if writes else (_ignore, _ignore_close)
    try:
        for index, record in enumerate(generator.continue_all(contexts)):
            count += 1
            write(record)
            if record.failed:
                failed.append(record)
                if writes:
                    get_logger(__name__).warning("prompt %d: %s", index + 1, record.message)
            elif writes and show is not None and index < _SHOWN:
                _show(show, index, record)
    finally:
        close()
    if failed and len(failed) == count:
        raise RunError.of(f"none of the {count} prompts could be continued", location=str(path))
    if writes:
        get_logger(__name__).info("%d of %d texts written to %s", count - len(failed), count, path)


def _writer(path: Path) -> tuple[Callable[[GenerationResult], None], Callable[[], None]]:
    """Functions that write a record and close the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise RunError.of(
            f"cannot write the texts ({error.strerror})", key="sample_output_file", value=str(path)
        ) from error

    def write(record: GenerationResult) -> None:
        file.write(json.dumps(record.as_json(), ensure_ascii=False) + "\n")
        file.flush()

    return write, file.close


def _ignore(record: GenerationResult) -> None:
    """A rank that writes nothing."""


def _ignore_close() -> None:
    """A rank that opened nothing."""


def _show(target: TextIO, index: int, record: GenerationResult) -> None:
    target.write(f"--- text {index + 1}, {record.length} tokens\n{record.context}{record.text or ''}\n")
    target.flush()
