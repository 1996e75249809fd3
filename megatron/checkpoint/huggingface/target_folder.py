"""Which files of a folder other programs would read together with those of a model that is written there.

Refused before any work: no program says that it took the end token of an earlier model's special_tokens_map.json.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from megatron.errors import RunError

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt")
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "encoder.json", "merges*", "*.model", "*.tiktoken", "tekken.json", "normalizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja", "additional_chat_templates"),
)
_SETTINGS = ("config.json", "params.json", "generation_config.json", "quantize_config.json", "hf_quant_config.json")
_ADAPTER = ("adapter_config.json", "adapter_model.*")
_SHOWN = 8


def refuse_model_files(output: Path, *, tokenizer: bool) -> None:
    """RunError where the folder has files of a model. tokenizer: those of a tokenizer too, as one is to be written."""
    further = TOKENIZER_FILES if tokenizer else ()
    _refuse(output, (*_SETTINGS, *_ADAPTER, *WEIGHT_FILES, *further), "files of a model")


def refuse_adapter_files(output: Path, *, tokenizer: bool = False) -> None:
    """RunError where the folder has files of a model or an adapter. An adapter's may stand beside a tokenizer's.

    tokenizer: those of a tokenizer too, as one is to be written.
    """
    further = TOKENIZER_FILES if tokenizer else ()
    _refuse(output, (*_SETTINGS, *_ADAPTER, *WEIGHT_FILES, *further), "files of a model")


def refuse_other_tokenizer(source: Path, target: Path) -> None:
    """RunError where a folder has files of another tokenizer than the one to be copied there."""
    foreign = [name for name in _matching(target, TOKENIZER_FILES) if not _is_copy(source / name, target / name)]
    _raise_for(foreign, target, "files of another tokenizer")


def _refuse(output: Path, patterns: Sequence[str], what: str) -> None:
    _raise_for(_matching(output, patterns), output, what)


def _raise_for(names: Sequence[str], folder: Path, what: str) -> None:
    if not names:
        return
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    listed = ", ".join(names[:_SHOWN]) + more
    hint = "give an empty or new one, or remove them"
    raise RunError.of(
        f"the folder already holds {what}, which would be read with the new ones: {listed}",
        location=str(folder),
        hint=hint,
    )


def _matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _is_copy(source: Path, target: Path) -> bool:
    if source.is_dir() or target.is_dir():
        return source.is_dir() and target.is_dir()
    return source.is_file() and source.read_bytes() == target.read_bytes()
