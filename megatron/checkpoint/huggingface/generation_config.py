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
_HINT = "write it with transformers, or remove it"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DEFAULTS: Mapping[str, Any] = {
    "max_length": None,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "length_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "penalty_alpha": None,
    "renormalize_logits": False,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "early_stopping": False,
    "constraints": None,
    "force_words_ids": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "token_healing": False,
    "watermarking_config": None,
    "dola_layers": None,
}
"""Settings that can change what is generated and have no key here, with their neutral values."""
_OF_BEAMS = ("length_penalty", "early_stopping", "diversity_penalty", "num_beam_groups", "num_return_sequences")
"""Of those, what changes nothing without beams."""
_APPLIED = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "stop_strings"),
    *IDS,
)
_HARMLESS = (
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "low_memory"),
    *("prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    # drafts, which the model checks: the texts are as likely as without
    *("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type"),
    *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    # scores that are not numbers are an error here; only encoders and decoders have a token to start with
    *("remove_invalid_values", "decoder_start_token_id"),
    *("transformers_version", "_from_model_config", "_commit_hash", "trust_remote_code"),
)
"""Settings that change no text, whatever they are."""


def generation_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder says of generation. config: its config.json, of which only such settings are taken."""
    path = folder / GENERATION
    known = (*_DEFAULTS, *_APPLIED)
    said = (
        files.read_object(path, _HINT) if path.is_file() else {name: config[name] for name in known if name in config}
    )
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
    """Generation settings that have no key here: all that are set, but for those that change no text.

    `max_length` counts the prompt too, unlike any key here, and only where there is no `max_new_tokens`.
    """
    quiet = {*_APPLIED, *_HARMLESS}
    quiet |= set() if (said.get("num_beams") or 1) > 1 else set(_OF_BEAMS)
    quiet |= {"max_length"} if said.get("max_new_tokens") is not None else set()
    return sorted(
        f"{name} = {value!r}"
        for name, value in said.items()
        if name not in quiet and _is_set(value) and value != _DEFAULTS.get(name)
    )


def _is_set(value: Any) -> bool:
    """Whether a value says anything; the number 0 does, as the id of a token."""
    return not (value is None or value is False or value in ([], {}, ""))


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
    said = files.read_object(path, _HINT) if path.is_file() else {}
    files.write_json(path, {**said, **{name: value for name, value in ids.items() if value is not None}})


def facts_of_tokenizer(directory: Path) -> dict[str, Any]:
    """What a checkpoint of ours keeps of the run's tokenizer: its kind, vocab_size and eod. Empty where it does not."""
    path = directory / layout.RUN
    found = files.read_json(path).get("tokenizer") if path.is_file() else None
    return found if isinstance(found, dict) else {}
