"""Log-probabilities of tokens in the forms of OpenAI's two interfaces.

They are the model's own, before temperature, penalties and cuts. In a mapping by text, as completions have it, the
likeliest token wins where two have the same text. A number below -9999 is given as that, since JSON has no infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.serving.streaming import TokenScore
from megatron.serving.token_text import Words

LEAST = -9999.0


def completion_logprobs(words: Words, tokens: Sequence[TokenScore]) -> dict[str, Any]:
    """Of a completion: one entry a token in each list; null where a token has no log-probability.

    The token that ended it is the last, although it leaves no text, as vLLM and OpenAI have it: lm-eval leaves the last
    one out as what it did not ask for.
    """
    return {
        "tokens": [words.text(each.token) for each in tokens],
        "token_logprobs": [_finite(each.log_probability) for each in tokens],
        "top_logprobs": [_by_text(words, each) for each in tokens],
        "text_offset": [each.offset for each in tokens],
    }


def chat_logprobs(words: Words, tokens: Sequence[TokenScore], most: int) -> dict[str, Any]:
    """Of a message. most: how many of the likeliest tokens are listed for each."""
    return {
        "content": [
            {
                **_entry(words, each.token, each.log_probability),
                "top_logprobs": [
                    _entry(words, token, value) for token, value in list((each.likeliest or {}).items())[:most]
                ],
            }
            for each in tokens
        ],
        "refusal": None,
    }


def _by_text(words: Words, score: TokenScore) -> dict[str, float | None] | None:
    if score.likeliest is None:
        return None
    found: dict[str, float | None] = {}
    for token, value in score.likeliest.items():
        found.setdefault(words.text(token), _finite(value))
    return found


def _entry(words: Words, token: int, value: float | None) -> dict[str, Any]:
    return {"token": words.text(token), "logprob": _finite(value), "bytes": words.bytes_of(token)}


def _finite(value: float | None) -> float | None:
    return None if value is None else max(value, LEAST)
