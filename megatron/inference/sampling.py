"""From the scores of the next token to a token.

Greedy (the likeliest token) when temperature, top_k, top_p and min_p are all 0. Otherwise the scores are, in this
order, divided by the temperature (0 leaves them as they are), and tokens are left out that are not among the top_k
likeliest, not in the smallest set of likeliest tokens whose probability exceeds top_p (nucleus sampling, Holtzman et
al. 2020, arXiv:1904.09751), or less likely than min_p times the likeliest (arXiv:2407.01082). A repetition penalty
divides positive scores of tokens already seen, and multiplies negative ones (Keskar et al. 2019, arXiv:1909.05858).
Behind it OpenAI's own: the frequency penalty is taken off once for each time that a token is in the new text, the
presence penalty once for a token that is there at all, and a bias is added to the scores of given tokens.

A temperature below `COLD` is greedy: the division would leave the numbers of fp32. Where scores are no numbers (NaN, or
infinite), no token is chosen and NO_TOKEN stands for it, so that only the text in question suffers.

One token costs one number drawn from a generator on the CPU, looked up in the cumulative distribution, so that a seed
gives the same text whatever the device, and on every rank.

v vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_TOKEN = -1
"""In place of a token that cannot be chosen."""
COLD = 1e-5
"""Temperatures below this one take the likeliest token."""

_FEW = 1024
"""The likeliest tokens that a nucleus is first sought among."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; 0 (1 for the penalty) switches a part off."""

    temperature: float = 0.0
    """Divisor of the scores. top_k [tokens]. top_p, min_p [probability]."""
    top_k: int = 0
    """Number of likeliest tokens to sample from [tokens]."""
    top_p: float = 0.0
    """Probability mass to sample from."""
    min_p: float = 0.0
    """Least probability, relative to the likeliest token."""
    repetition_penalty: float = 1.0
    """Divisor."""
    frequency_penalty: float = 0.0
    """Taken off scores."""
    presence_penalty: float = 0.0
    """Taken off scores."""
    bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its score)."""

    @property
    def changes_scores(self) -> bool:
        """Whether a choice depends on more than the model's scores and chance."""
        return self.repetition_penalty != 1.0 or self.adds

    @property
    def adds(self) -> bool:
        """Whether numbers are added to scores."""
        return bool(self.bias or self.frequency_penalty or self.presence_penalty)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        cut = self.top_k > 0 or self.top_p > 0 or self.min_p > 0
        return self.temperature < COLD and not (self.temperature == 0 and cut)


class Sampler:
    """Chooses the tokens of one text.

    Args:
        sampling: Temperature, top-k, top-p and penalties.
        vocab_size: Ids from here on are padding of the vocabulary and are never chosen.
        seed: Seed of the run.
        text_index: Number of the text; with the seed it selects a stream of random numbers of its own.
        prompt_tokens: Number of tokens of the text that are not new.
    """

    def __init__(
        self, sampling: Sampling, *, vocab_size: int, seed: int, text_index: int = 0, prompt_tokens: int = 0
    ) -> None:
        self.sampling = sampling
        self.vocab_size = vocab_size
        self._prompt_tokens = prompt_tokens
        self._generator = torch.Generator().manual_seed((seed * 1_000_003 + text_index) % 2**63)

    @property
    def is_greedy(self) -> bool:
        """Whether the scores alone decide, as the model gives them."""
        return self.sampling.greedy and not self.sampling.changes_scores

    def choose(self, logits: Tensor, seen: Sequence[int] = ()) -> int:
        """The next token, or NO_TOKEN. logits [v]; seen: the tokens of the text so far, for the penalties."""
        logits = penalised(logits[: self.vocab_size].float(), seen, self.sampling.repetition_penalty)
        if self.sampling.adds:
            logits = shifted(logits, seen[self._prompt_tokens :], self.sampling)
        if self.sampling.greedy:
            best = logits.max(0)
            return int(best.indices) if best.values.isfinite() else NO_TOKEN
        cumulative = distribution(logits, self.sampling).double().cumsum(0).cpu()  # [v]
        if not cumulative[-1] > 0:  # NaN too
            return NO_TOKEN
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator) * cumulative[-1]
        # The first token whose cumulative probability is above the number; one of probability 0 never does so first.
        return int(torch.searchsorted(cumulative, drawn, right=True).clamp(max=_last_possible(cumulative)))


def choose_all(samplers: Sequence[Sampler], logits: Tensor, seen: Sequence[Sequence[int]]) -> list[int]:
    """The next token of each text of a batch, or NO_TOKEN. logits [b, v]; seen: the tokens of each text so far."""
    first = samplers[0]
    if all(each.is_greedy and each.vocab_size == first.vocab_size for each in samplers):
        best = logits[:, : first.vocab_size].max(-1)
        likeliest: list[int] = best.indices.where(best.values.isfinite(), NO_TOKEN).tolist()
        return likeliest
    return [sampler.choose(row, past) for sampler, row, past in zip(samplers, logits, seen, strict=True)]


def penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """The logits [v] with the scores of seen tokens lowered; a new tensor unless there is nothing to do.

    A penalty so small that the division overflows leaves the largest number.
    """
    if penalty == 1.0 or not seen:
        return logits
    at = torch.tensor(sorted({token for token in seen if token < len(logits)}), device=logits.device)
    scores = logits[at]
    lowered = torch.where(scores > 0, scores / penalty, scores * penalty)
    lowered = torch.where(scores.isfinite(), lowered.nan_to_num(), scores)
    return logits.scatter(0, at, lowered)


def shifted(logits: Tensor, new: Sequence[int], sampling: Sampling) -> Tensor:
    """The logits [v] with biases added, and with the penalties for tokens of the new text taken off; a new tensor."""
    change = dict.fromkeys([token for token, _ in sampling.bias], 0.0)
    for token, count in Counter(new).items():
        change[token] = -sampling.presence_penalty - sampling.frequency_penalty * count
    for token, bias in sampling.bias:
        change[token] += bias
    known = {token: by for token, by in change.items() if token < len(logits)}
    at = torch.tensor(list(known), dtype=torch.long, device=logits.device)
    return logits.index_add(0, at, torch.tensor(list(known.values()), dtype=logits.dtype, device=logits.device))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities [v] that tokens are drawn with; they add up to 1. logits [v] fp32."""
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if sampling.top_k > 0:
        least = torch.topk(logits, min(sampling.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p > 0:
        logits = _within_nucleus(logits, sampling.top_p)
    probabilities = logits.softmax(0)
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0.0)
        probabilities = probabilities / probabilities.sum()
    return probabilities


def _within_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Leaves out a token when the likelier ones together exceed top_p already."""
    candidates = _nucleus(logits, top_p, _FEW) if len(logits) > _FEW else None
    if candidates is None:
        candidates = _nucleus(logits, top_p, len(logits))
        assert candidates is not None, "the full vocabulary always holds the nucleus"
    outside = torch.ones_like(logits, dtype=torch.bool).index_fill(0, candidates, False)
    return logits.masked_fill(outside, -math.inf)


def _nucleus(logits: Tensor, top_p: float, among: int) -> Tensor | None:
    """The ids of the nucleus, the likeliest first, equally likely ones by id; sought among the `among` likeliest.

    Returns None where it may reach beyond those. To sort a whole vocabulary costs several times a topk.
    """
    near = torch.topk(logits, among, sorted=False).indices.sort().values
    order = near[logits[near].sort(descending=True, stable=True).indices]
    probabilities = logits.softmax(0)[order]
    before = probabilities.cumsum(0) - probabilities
    before[0] = 0.0  # exact, so that the likeliest token always stays
    inside = order[before <= top_p]
    reaches_beyond = bool(logits[inside[-1]] == logits[order[-1]])
    return None if among < len(logits) and reaches_beyond else inside


def _last_possible(cumulative: Tensor) -> int:
    """Index of the last token with a probability above 0."""
    return int(torch.searchsorted(cumulative, cumulative[-1]))
