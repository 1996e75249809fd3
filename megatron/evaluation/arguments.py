"""What a task's generation arguments mean here.

What a task leaves out is what the model's own generation settings say, as with lm-eval's `hf` model, where
`transformers` fills it in from generation_config.json, and samples from 50 tokens where that has no `top_k` either.

Sources: lm-eval 0.4.13, lm_eval/models/utils.py (normalize_gen_kwargs); transformers 5.23, GenerationMixin
(_prepare_generation_config).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.errors import ConfigError
from megatron.inference.sampling import Sampling

_DEFAULT_NEW_TOKENS = 256  # lm-eval's own, where a task does not say
_TOP_K = 50  # of transformers, where neither a task nor the model says
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KEYS = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "typical_p": (1.0,),
    "no_repeat_ngram_size": (0,),
    "early_stopping": (False,),
    "use_cache": (True, False),
}
"""Arguments of `transformers` that change no text as long as they have these values; None never does."""


@dataclass(frozen=True)
class TaskArguments:
    """until: texts at which an answer ends. maximum_tokens [tokens]. sampling: how tokens are chosen."""

    until: tuple[str, ...]
    """Texts at which an answer ends."""
    maximum_tokens: int
    """Longest answer [tokens]."""
    sampling: Sampling
    """Sampling settings."""


def read_arguments(
    arguments: Mapping[str, Any], task: str | None = None, *, own: Sampling | None = None
) -> TaskArguments:
    """The arguments of one task. Raises ConfigError for one that cannot be followed.

    Args:
        arguments: As lm-eval has them.
        task: Name of the task, for messages.
        own: The model's generation settings, for what the task leaves out.
    """
    for name, value in arguments.items():
        harmless = value is None or value in _WITHOUT_EFFECT.get(name, ())
        if name not in _KEYS and not harmless:
            raise _refused(f"a task asks for {name} = {value!r}, which cannot be done here", task)
    until = arguments.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(text, str) for text in until):
        raise _refused(f"until = {until!r} are not texts", task)
    try:
        length = next((arguments[name] for name in _LENGTHS if arguments.get(name) is not None), _DEFAULT_NEW_TOKENS)
        sampling = _sampling(arguments, own or Sampling())
    except (TypeError, ValueError) as error:
        raise _refused(f"an argument is not a number ({error})", task) from error
    if sampling is None:
        what = "do_sample needs a temperature above 0; without it a task takes the likeliest tokens"
        raise _refused(f"temperature = {arguments.get('temperature')!r}: {what}", task)
    return TaskArguments(until, int(length), sampling)


def _sampling(arguments: Mapping[str, Any], own: Sampling) -> Sampling | None:
    """Greedy unless a task samples: with `do_sample`, or a temperature where that is left out.

    None where `do_sample` has no temperature to sample at, neither the task's nor the model's own.
    """
    temperature = float(arguments.get("temperature") or 0.0)
    penalty = float(arguments.get("repetition_penalty", own.repetition_penalty) or 1.0)
    sampled = arguments.get("do_sample")
    if not (temperature > 0 if sampled is None else sampled):
        return Sampling(repetition_penalty=penalty)
    if arguments.get("temperature") is None and not own.greedy:
        temperature = own.temperature or 1.0
    if temperature <= 0:
        return None
    cuts = Sampling(top_k=_TOP_K) if own.greedy else own
    said = arguments.get("top_p")
    top_p = cuts.top_p if said is None else float(said)
    return Sampling(
        temperature=temperature,
        top_k=1 if said is not None and top_p <= 0 else int(arguments.get("top_k", cuts.top_k) or 0),
        top_p=top_p if top_p < 1 else 0.0,
        min_p=float(arguments.get("min_p", cuts.min_p) or 0.0),
        repetition_penalty=penalty,
    )


def _refused(what: str, task: str | None) -> ConfigError:
    return ConfigError.of(
        what,
        key="generation_kwargs",
        location=None if task is None else f"task {task}",
        hint=f"a task may set {', '.join(_KEYS)}",
    )
