"""The files beside the weights: tokenizer, chat templates, generation settings and licence.

A tokenizer that has a tokenizer.json is given away under the class PreTrainedTokenizerFast. Under it every release of
`transformers` takes that file as it is; releases before 5 know no TokenizersBackend, and release 5 builds tokenizers
anew, with other ids at times, for classes such as GPT2Tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron.checkpoint.format import files
from megatron.checkpoint.huggingface.target_folder import TOKENIZER_FILES, WEIGHT_FILES

CONFIG, TOKENIZER_FILE, TEMPLATES = "tokenizer_config.json", "tokenizer.json", "additional_chat_templates"
_COPIED = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_MODEL_FILES = (*WEIGHT_FILES, "*.py")
_HEED_FLAGS = ("LlamaTokenizer", "TokenizersBackend", "PreTrainedTokenizer")
_OF_RELEASE_5 = ("backend", "is_local", "local_files_only", "auto_map")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies what is neither weights nor code. The names of the files.

    The class is copied, which decides how a text is read, but for one that only the newest release knows.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = []
    for path in sorted(source.iterdir()):
        requested = any(path.match(pattern) for pattern in _COPIED)
        if path.is_file() and requested and not any(path.match(pattern) for pattern in _MODEL_FILES):
            shutil.copyfile(path, target / path.name)
            names.append(path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)
    path = target / CONFIG
    settings = files.read_json(path) if path.is_file() else None
    if isinstance(settings, dict) and settings.get("tokenizer_class") == "TokenizersBackend":
        files.write_json(path, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    return names


def for_every_release(folder: Path, *, own: bool) -> None:
    """Rewrites tokenizer_config.json beside a tokenizer.json, so that all releases read the same tokenizer.

    own: the tokenizer.json was written for a .model, whose class heeds add_bos_token and add_eos_token. One that was
    there before says itself what is before a text, here and in release 5; the flags, which earlier ones heed, go.
    """
    path = folder / CONFIG
    if not path.is_file() or not (folder / TOKENIZER_FILE).is_file():
        return
    settings = files.read_json(path)
    if not isinstance(settings, dict):
        return
    made = {key: value for key, value in settings.items() if key not in _OF_RELEASE_5}
    flags = {name: made.pop(f"add_{name}_token", None) for name in ("bos", "eos")}
    if own:
        _put_flags_into_file(folder / TOKENIZER_FILE, made, flags)
    made["tokenizer_class"] = "PreTrainedTokenizerFast"
    further = made.get("extra_special_tokens")
    if isinstance(further, list):  # releases before 5 want an object of that name
        del made["extra_special_tokens"]
        made["additional_special_tokens"] = [*made.get("additional_special_tokens", ()), *further]
    if made != settings:
        files.write_json(path, made)


def _put_flags_into_file(path: Path, settings: dict[str, Any], flags: dict[str, Any]) -> None:
    """Turns add_bos_token and add_eos_token into what tokenizer.json does by itself.

    settings: tokenizer_config.json. flags: `bos` and `eos`, None where they are not given. Classes that
    never heeded them keep the file as it is.
    """
    heeded = str(settings.get("tokenizer_class", "")).removesuffix("Fast").endswith(_HEED_FLAGS)
    if not heeded or set(flags.values()) == {None}:
        return
    content = files.read_json(path)
    steps = content.get("post_processor") or {}
    steps = steps.get("processors", [steps]) if steps else []
    template: dict[str, Any] = next(
        (step for step in steps if step.get("type") == "TemplateProcessing"), {"single": []}
    )
    parts = [next(iter(part.items())) for part in template["single"]]
    sequence_index = next((number for number, (kind, _) in enumerate(parts) if kind == "Sequence"), 0)
    now = {"bos": sequence_index > 0, "eos": sequence_index < len(parts) - 1}
    requested = {name: now[name] if flag is None else bool(flag) for name, flag in flags.items()}
    if requested == now:
        return
    ids = {entry["content"]: entry["id"] for entry in content.get("added_tokens", ())}
    tokens = {name: _text(settings.get(f"{name}_token")) for name in requested}
    if any(requested[name] and tokens[name] not in ids for name in requested):
        return
    content["post_processor"] = _template({name: token for name, token in tokens.items() if requested[name]}, ids)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _template(tokens: dict[str, Any], ids: dict[str, int]) -> dict[str, Any] | None:
    """The post-processor that puts `bos` before a text and `eos` behind it."""
    if not tokens:
        return None

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        marks = {end: [{"SpecialToken": {"id": tokens[end], "type_id": kind}}] for end in tokens}
        return [*marks.get("bos", []), {"Sequence": {"id": name, "type_id": kind}}, *marks.get("eos", [])]

    known = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in tokens.values()}
    pair = [*around("A", 0), *around("B", 1)]
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": known}


def _text(settings: Any) -> Any:
    return settings.get("content") if isinstance(settings, dict) else settings
