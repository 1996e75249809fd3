"""How likely a model finds a text: sums of log-probabilities of given tokens.

Texts are scored in batches, longest first, padded on the right; causal attention never looks to the right, so a score
does not depend on what else is in the batch (up to the rounding of differently shaped matrix products).

b batch, s sequence, v padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.engine.engine import Engine
from megatron.errors import RunError


@dataclass(frozen=True)
class Pair:
    """Tokens to score and the tokens before them. The context holds at least one token."""

    context: tuple[int, ...]
    """Tokens in front."""
    continuation: tuple[int, ...]
    """Tokens to score."""

    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return (self.context + self.continuation)[:-1]


@dataclass(frozen=True)
class Score:
    """log_likelihood: of the continuation [nats]. greedy: whether each of its tokens was the likeliest."""

    log_likelihood: float
    """Log-likelihood of the continuation [nats]."""
    greedy: bool
    """True if each token of the continuation is the likeliest one."""

    def __add__(self, other: Score) -> Score:
        return Score(self.log_likelihood + other.log_likelihood, self.greedy and other.greedy)


NOTHING = Score(0.0, True)


def windows(
    context: Sequence[int], tokens: Sequence[int], max_length: int, stride: int | None = None
) -> Iterator[Pair]:
    """Cuts a long text into pairs that fit a model, each token scored exactly once, and as much context as fits.

    Args:
        context: What is before the text, at least one token.
        tokens: The tokens of one document.
        max_length: The most tokens that the model reads at once.
        stride: How many each window after the first scores at most; a small one gives each token a longer context and
            costs more. The default, max_length, is the rolling log-likelihood of the Language Model Evaluation Harness
            [tokens].
    """
    stride = max_length if stride is None else stride
    if not context or not 1 <= stride <= max_length:
        raise ValueError("a context of at least one token and a stride within the model's length are needed")
    before = list(context)[-max_length:]
    text = before + list(tokens)
    # The model reads all tokens of a pair but the last, so that a pair may be one token longer than max_length.
    start, end = len(before), min(len(text), max_length + 1)
    while start < len(text):
        first = max(0, end - 1 - max_length)
        yield Pair(tuple(text[first:start]), tuple(text[start:end]))
        start, end = end, min(len(text), end + stride)


def score(
    engine: Engine,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_size: int,
    padding: int = 0,
    vocabulary: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> list[Score]:
    """The score of each pair, in order. Collective over the model's ranks.

    A context that does not fit is cut on its left. A continuation that does not fit is scored in windows.

    Args:
        engine: The model.
        pairs: Contexts with their continuations.
        max_length: The most tokens that the model reads at once.
        batch_size: Sequences in one forward pass.
        padding: The token that fills short rows; any will do.
        vocabulary: The ids that exist, all unless given; those past them have no probability, as in training [tokens].
        on_progress: Is called with the fraction of the work that is done, after each batch. A score is NaN where the
            model's scores are.
    """
    pieces: list[Pair] = []
    owners: list[int] = []
    for number, pair in enumerate(pairs):
        for piece in _fitting(pair, max_length):
            pieces.append(piece)
            owners.append(number)
    order = sorted(range(len(pieces)), key=lambda at: (-len(pieces[at].inputs()), pieces[at].inputs()))
    scores = [NOTHING] * len(pairs)
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        for at, found in zip(
            batch, _score_batch(engine, [pieces[at] for at in batch], padding, vocabulary), strict=True
        ):
            scores[owners[at]] += found
        if on_progress is not None:
            on_progress((begin + len(batch)) / len(order))
    return scores


class NotNumbers(RunError):
    """What a model says of a text is NaN or infinite, so that nothing can be concluded from it."""


def require_numbers(scores: Sequence[Score], what: str) -> None:
    """Raises NotNumbers where a score is not a number. what: was scored."""
    wrong = [each.log_likelihood for each in scores if not math.isfinite(each.log_likelihood)]
    if wrong:
        raise NotNumbers.of(
            f"{len(wrong)} of {len(scores)} {what} have no score: their log-likelihood is {wrong[0]}",
            hint="look for NaN or infinite values in the checkpoint, or for an overflow in its precision",
        )


def too_long(pairs: Sequence[Pair], max_length: int) -> int:
    """How many pairs the model cannot read whole."""
    return sum(len(pair.context) + len(pair.continuation) > max_length + 1 for pair in pairs)


def _fitting(pair: Pair, max_length: int) -> Iterator[Pair]:
    """The pair, cut to what the model can read."""
    if not pair.continuation:
        return
    if len(pair.continuation) > max_length:
        yield from windows(pair.context[-1:], pair.continuation, max_length)
        return
    room = max_length + 1 - len(pair.continuation)
    yield Pair(pair.context[-room:], pair.continuation)


def token_scores(
    engine: Engine, pairs: Sequence[Pair], *, batch_size: int, padding: int = 0, vocabulary: int | None = None
) -> list[Tensor]:
    """The log-probability of each token of each continuation, fp32 [continuation], in order. Pairs must fit.

    Args:
        engine: The model.
        pairs: Contexts with their continuations.
        batch_size: Sequences in one forward pass.
        padding: The id that fills shorter sequences.
        vocabulary: As in `score`.
    """
    found: list[Tensor] = []
    for begin in range(0, len(pairs), batch_size):
        batch = pairs[begin : begin + batch_size]
        found += [each.float().cpu() for each, _ in _tokens_of_batch(engine, batch, padding, vocabulary)]
    return found


def _score_batch(engine: Engine, pairs: Sequence[Pair], padding: int, vocabulary: int | None) -> list[Score]:
    """Scores of pairs that fit, in one forward pass."""
    found = _tokens_of_batch(engine, pairs, padding, vocabulary)
    return [Score(float(each.sum()), bool(greedy.all())) for each, greedy in found]


@torch.no_grad()
def _tokens_of_batch(
    engine: Engine, pairs: Sequence[Pair], padding: int, vocabulary: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Of each token of each continuation, its log-probability, and whether it was the likeliest.

    The output layer runs for the scored positions only.
    """
    inputs = list(dict.fromkeys(pair.inputs() for pair in pairs))  # answers of one token share a row
    row_of = {each: row for row, each in enumerate(inputs)}
    longest = max(len(each) for each in inputs)
    tokens = torch.tensor([[*each, *[padding] * (longest - len(each))] for each in inputs])  # [b, s]
    at = [
        row_of[pair.inputs()] * longest + position
        for pair in pairs
        for position in range(len(pair.inputs()) - len(pair.continuation), len(pair.inputs()))
    ]
    selected = sorted(set(at))
    logits = engine.logits(tokens, None, torch.tensor(selected))[:, :vocabulary]  # [k, v]
    found = {position: row for row, position in enumerate(selected)}
    targets = torch.tensor([token for pair in pairs for token in pair.continuation], device=logits.device)
    scored = logits[[found[position] for position in at]] if len(selected) < len(at) else logits  # [tokens, v]
    likely = scored.argmax(-1) == targets
    chosen = scored.gather(-1, targets[:, None])[:, 0].double() - scored.logsumexp(-1).double()
    sizes = [len(pair.continuation) for pair in pairs]
    return list(zip(chosen.split(sizes), likely.split(sizes), strict=True))
