"""Rotary frequencies for contexts longer than in the first training (`rope_scaling`).

linear (arXiv:2306.15595): every frequency is divided by `factor`. dynamic (NTK-aware): the base is raised so that the
slowest pair reaches `factor` times further than at `original_max_position_embeddings`. It depends on the `seq_length`
of the run, not on each sequence, so that cached keys keep their angles; a model whose sequences are not longer than
that is unchanged. yarn (arXiv:2309.00071): fast pairs are unchanged, slow ones are divided by `factor`, those between
are interpolated, from whole pairs on unless `truncate` is false; cosines and sines are multiplied by an attention
factor, 0.1 ln(factor) + 1 unless set, or the ratio of such factors of `mscale` and `mscale_all_dim` (DeepSeek). llama3
(Llama 3.1): the same idea with bounds in wavelengths.

Angles are position * frequency. r: rotated features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Scaled = tuple[Tensor, float]
"""Frequencies fp32 [r/2], and a factor of cosines and sines."""


def frequencies(turned: int, base: float) -> Tensor:
    """Returns the frequencies of the paper: base^(-2 i / r), fp32 [r/2]."""
    return 1.0 / base ** (torch.arange(0, turned, 2, dtype=torch.float32, device="cpu") / turned)


def scaled(turned: int, base: float, scaling: Mapping[str, Any] | None, length: int) -> Scaled:
    """Returns the frequencies of a model.

    Args:
        turned: rotated features of a head.
        base: `rotary_emb_base`.
        scaling: the `rope_scaling` block.
        length: the run's longest sequence [tokens].
    """
    if not scaling:
        return frequencies(turned, base), 1.0
    return _KINDS[scaling["type"]](turned, base, scaling, length)


def _linear(turned: int, base: float, scaling: Mapping[str, Any], length: int) -> Scaled:
    return frequencies(turned, base) / scaling["factor"], 1.0


def _dynamic(turned: int, base: float, scaling: Mapping[str, Any], length: int) -> Scaled:
    factor = scaling["factor"]
    stretch = max(1.0, length / scaling["original_max_position_embeddings"])
    return frequencies(turned, base * (factor * stretch - (factor - 1)) ** (turned / (turned - 2))), 1.0


def _yarn(turned: int, base: float, scaling: Mapping[str, Any], length: int) -> Scaled:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        """The pair that turns that often over the original context."""
        return turned * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    fast, slow = pair_of(scaling.get("beta_fast", 32)), pair_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        fast, slow = math.floor(fast), math.ceil(slow)
    low, high = max(fast, 0), min(slow, turned - 1)
    ramp = (torch.arange(turned // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)
    scaled_part = ramp.clamp(0, 1)
    plain = frequencies(turned, base)
    attention = scaling.get("attention_factor") or _yarn_attention(scaling)
    return plain / factor * scaled_part + plain * (1 - scaled_part), attention


def _yarn_attention(scaling: Mapping[str, Any]) -> float:
    """Returns the factor of cosines and sines; where both factors of DeepSeek are given, their ratio."""
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if over and under:
        return yarn_mscale(scaling["factor"], over) / yarn_mscale(scaling["factor"], under)
    return yarn_mscale(scaling["factor"])


def yarn_mscale(factor: float, multiple: float = 1.0) -> float:
    """Returns 0.1 multiple ln(factor) + 1, by which the attention of longer contexts is sharper."""
    return 0.1 * multiple * math.log(factor) + 1.0 if factor > 1 else 1.0


def score_factor(scaling: Mapping[str, Any] | None) -> float:
    """Returns the factor of the scores of latent attention: the square of mscale_all_dim's, as DeepSeek has it."""
    if not scaling or not scaling.get("mscale_all_dim"):
        return 1.0
    return yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def _llama3(turned: int, base: float, scaling: Mapping[str, Any], length: int) -> Scaled:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    plain = frequencies(turned, base)
    turns = original * plain / (2 * math.pi)  # of each pair over the original context
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - unscaled) + plain * unscaled, 1.0


_KINDS: dict[str, Callable[[int, float, Mapping[str, Any], int], Scaled]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
