"""What a folder of `transformers` says of generation, as keys of ours and back: end ids and how to sample.

generation_config.json has it, and config.json where that is missing. A folder that samples has the defaults of
`transformers` for what it leaves out. Source: GenerationConfig of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.format import files, layout

GENERATION = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OFF: Mapping[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "guidance_scale": None,
}
"""Settings that change what is generated and have no key here, with their neutral values."""


def generation_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder says of generation. config: its config.json."""
    path = folder / GENERATION
    said = dict(files.read_json(path)) if path.is_file() else dict(config)
    ids = {name: config[name] for name in IDS if config.get(name) is not None}
    return {**said, **{name: number for name, number in ids.items() if said.get(name) is None}}


def end_ids(said: Mapping[str, Any]) -> list[int]:
    """The ids that end a text, in order."""
    ids = said.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    return distinct(number for number in listed if isinstance(number, int) and number >= 0)


def sampling(said: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys for how the folder samples, and where it stops; nothing where it takes the likeliest token.

    A temperature of 0, which `transformers` does not sample at, takes the likeliest token too.
    """
    found: dict[str, Any] = {}
    if said.get("do_sample") and said.get("temperature") != 0:
        temperature, top_k, top_p = said.get("temperature"), said.get("top_k"), said.get("top_p")
        found["temperature"] = 1.0 if temperature is None else float(temperature)
        found["top_k"] = 50 if top_k is None else int(top_k)
        if top_p is not None and top_p <= 0:
            found["top_k"] = 1  # the likeliest token always stays; our 0 leaves out nothing
        elif top_p is not None and top_p < 1.0:
            found["top_p"] = float(top_p)
        if said.get("min_p"):
            found["min_p"] = float(said["min_p"])
    if said.get("repetition_penalty") not in (None, 1.0):
        found["repetition_penalty"] = float(said["repetition_penalty"])
    if isinstance(said.get("max_new_tokens"), int):
        found["maximum_tokens"] = said["max_new_tokens"]
    stops = said.get("stop_strings")
    if stops:
        found["stop"] = [stops] if isinstance(stops, str) else list(stops)
    return found


def unheeded(said: Mapping[str, Any]) -> list[str]:
    """Generation settings that have no key here."""
    return sorted(f"{name} = {said[name]!r}" for name, off in _OFF.items() if said.get(name) not in (None, off, []))


def ids_for_config(
    said: Mapping[str, Any], *, ends: Iterable[int], begin: int | None, vocabulary: int
) -> dict[str, int | list[int] | None]:
    """bos, eos and pad for config.json.

    Args:
        said: Kept from the folder that a model came from, or empty.
        ends: Of the run, which are first unless they are among the kept ones.
        begin: Of the tokenizer.
        vocabulary: Rows of the embedding; further ids mean nothing.
    """
    known = end_ids(said)
    found = [number for number in distinct([*known, *ends]) if number < vocabulary]
    first = said.get("bos_token_id")
    ids: dict[str, int | list[int] | None] = {"bos_token_id": begin if first is None else first}
    ids["eos_token_id"] = found[0] if len(found) == 1 else found or None
    if said.get("pad_token_id") is not None:
        ids["pad_token_id"] = said["pad_token_id"]
    return ids


def distinct(numbers: Iterable[int]) -> list[int]:
    """Each number once, in order."""
    return list(dict.fromkeys(numbers))


def write_generation(folder: Path, ids: Mapping[str, Any]) -> None:
    """Puts the ids into generation_config.json, beside what was copied of it."""
    path = folder / GENERATION
    said = dict(files.read_json(path)) if path.is_file() else {}
    files.write_json(path, {**said, **{name: value for name, value in ids.items() if value is not None}})


def facts_of_tokenizer(directory: Path) -> dict[str, Any]:
    """What a checkpoint of ours keeps of the run's tokenizer: its kind, vocab_size and eod. Empty where it does not."""
    path = directory / layout.RUN
    found = files.read_json(path).get("tokenizer") if path.is_file() else None
    return found if isinstance(found, dict) else {}
