"""Sizes of an encoder-decoder: its blocks and tokens together follow from those of the two stacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron.errors import ConfigError, ConfigIssue

SPANS = "t5"
"""The objective whose model is an encoder-decoder."""
PARTS = {
    "num_layers": ("encoder_num_layers", "decoder_num_layers"),
    "seq_length": ("encoder_seq_length", "decoder_seq_length"),
}
"""Key of both stacks together -> the keys of the encoder and of the decoder."""
MOST_WORDS = 10
"""Most words of a span unless mask_max_ngram says otherwise, as in Megatron-LM."""

FRAME = 2
"""Tokens of the encoder that no text fills, as in Megatron-Core."""


def derive_sums(values: Mapping[str, Any]) -> dict[str, int]:
    """Returns num_layers, seq_length and max_position_embeddings of an encoder-decoder.

    Raises ConfigError for a size that is missing or contradicts its sum. values: those keys and the keys of PARTS, None
    where they are left out.
    """
    issues, found = [], dict[str, int]()
    for total, names in PARTS.items():
        sizes = [values[name] for name in names]
        for name, size in zip(names, sizes, strict=True):
            if size is None:
                hint = f"give {names[0]} and {names[1]}"
                issues.append(ConfigIssue(f"train_impl: {SPANS} needs it", key=name, hint=hint))
            elif size < 1:
                issues.append(ConfigIssue("this must be at least 1", key=name, value=size))
        if None in sizes:
            continue
        found[total] = sum(sizes)
        if values[total] not in (None, found[total]):
            what = f"it is the sum of {names[0]} and {names[1]}, {found[total]}"
            issues.append(ConfigIssue(what, key=total, value=values[total], hint="leave it out"))
    ConfigError.raise_any(issues)
    longest = max(values[name] for name in PARTS["seq_length"])
    return {**found, "max_position_embeddings": values["max_position_embeddings"] or longest}


def usual_spans(mask_prob: float, tokens: int, max_words: int, mean_words: float) -> tuple[int, int]:
    """Returns the spans of a full sample of words of one token, and the tokens of its decoder's input.

    Args:
        mask_prob: Share of tokens that are chosen [fraction].
        tokens: Of the sample.
        max_words: Most words of a span.
        mean_words: Mean of the geometric distribution.
    """
    chosen, share = max(1, round(tokens * mask_prob)), 1 / mean_words
    lengths = [share * (1 - share) ** words for words in range(max_words - 1)]  # of 1, 2, ... words
    lengths.append(1 - sum(lengths))
    expected = [0.0]  # spans of 0, 1, ... chosen tokens; a span that does not fit is as long as what is left
    for left in range(1, chosen + 1):
        expected.append(1 + sum(part * expected[max(left - words, 0)] for words, part in enumerate(lengths, 1)))
    spans = math.ceil(expected[chosen])
    return spans, 1 + chosen + spans
