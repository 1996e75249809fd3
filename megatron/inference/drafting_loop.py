"""The token loop with drafts: a model's own modules propose tokens, and the model reads several in one pass.

A pass over a text's last token and the drafts behind it gives the scores behind each of them. Tokens are chosen from
these in order, as without drafts: the likeliest one, or one drawn with the text's own random numbers. As long as the
chosen token is the draft, the scores behind it count too; the first other token ends the row of scores, and what the
cache holds behind it is written over. So every token is chosen from the scores that it would have been chosen from
without drafts, and the text is the same, up to the rounding of differently shaped matrix products. For a draft that is
certain this is the rule of speculative sampling (arXiv:2211.17192).

b batch, p new positions, d modules, h hidden, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from megatron.engine.drafter import Drafter, Known
from megatron.engine.engine import Engine
from megatron.inference.token_loop import RunningSequence, Step, TokenLoop, held
from megatron.model.kv_cache import KVCache


@dataclass(frozen=True)
class _Scored:
    """What the last pass made of a text."""

    start: int
    """Positions before it, which the modules have seen."""
    hidden: Tensor
    """Output of the final norm at its positions [p, h]."""
    tails: tuple[Tensor, ...]
    """The same, and of the modules, at the d positions before [d, h]."""
    scores: Tensor
    """Scores behind its positions [p, v]; none of a prompt, whose last ones are used at once."""
    drafts: tuple[int, ...]
    """Tokens of its positions behind the first one."""
    used: int = 0
    """Positions behind which the next token is chosen."""

    @property
    def counts(self) -> bool:
        """Whether there are scores for the next token."""
        return self.used < len(self.scores)


class DraftingLoop(TokenLoop):
    """A TokenLoop with a cache and with drafts.

    Args:
        engine: Computes logits.
        drafter: The model and its modules.
        tokens: Drafts of a pass.
        vocab_size: Ids from here on are padding of the vocabulary.
        rows: Largest number of texts at a time.
        max_length: Largest number of tokens of a text.
        cached: Always true.
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter,
        *,
        tokens: int,
        vocab_size: int,
        rows: int,
        max_length: int,
        cached: bool = True,
    ) -> None:
        assert cached, "the configuration is checked"
        super().__init__(engine, rows=rows, max_length=max_length)
        self._drafter, self._tokens, self._vocab_size = drafter, tokens, vocab_size
        depths = len(drafter.modules)
        self._own = drafter.new_caches(rows, max_length + depths + 1)  # padding behind a text may reach further
        self._scored: dict[int, _Scored] = {}

    def step(self) -> list[Step]:
        """One more token for the texts whose drafts were right so far, or for every text behind a further pass."""
        self._drop_ended()
        if not self.texts:
            return []
        if not any(self._scored[id(text)].counts for text in self.texts):
            self._run()
        texts = [text for text in self.texts if self._scored[id(text)].counts]
        found = [self._scored[id(text)] for text in texts]
        return self._choose(texts, torch.stack([one.scores[one.used] for one in found]))

    def leave(self, text: RunningSequence) -> None:
        """Drops a text; its row is free at once."""
        super().leave(text)
        self._scored.pop(id(text), None)  # a text whose prompt failed has none

    def _choose(self, texts: Sequence[RunningSequence], logits: Tensor) -> list[Step]:
        steps = super()._choose(texts, logits)
        for step in steps:
            one = self._scored.get(id(step.text))
            if one is None or not len(one.scores):
                continue
            right = one.used < len(one.drafts) and step.token == one.drafts[one.used]
            self._drafter.counts.accepted += right
            scores = one.scores if right else one.scores[: one.used + 1]
            self._scored[id(step.text)] = replace(one, scores=scores, used=one.used + 1)
        return steps

    def _caches(self) -> list[KVCache]:
        return [*super()._caches(), *self._own]

    def _stored(self, text: RunningSequence, cache: KVCache) -> int:
        one = self._scored.get(id(text))
        if one is None:
            return 0  # its prompt failed
        return one.start + (len(one.hidden) if cache is self._cache else 0)

    def _read(self, texts: Sequence[RunningSequence], tokens: Tensor, cache: KVCache | None, last: Tensor) -> Tensor:
        """Runs prompts, and shows them to the modules but for their last tokens, whose next ones are not known yet."""
        assert cache is not None
        logits, hidden = self._drafter.logits(tokens, cache, last)
        none = hidden.new_zeros(len(texts), len(self._own), hidden.shape[2])
        tails = [none] * len(self._own)
        counts = [len(text.tokens) - 1 for text in texts]
        first = len(self.texts) - len(texts)
        if max(counts):
            new = max(counts)
            known = Known([0] * len(texts), counts, hidden[:, :new], tails, tokens[:, 1 : new + 1])
            tails = self._drafter.extend(known, self._rows(first, len(texts)), self._vocab_size)[1]
        for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
            own = tuple(tail[row] for tail in tails)
            self._scored[id(text)] = _Scored(count, hidden[row, count : count + 1].clone(), own, logits[:0], (), 1)
        return logits

    def _rows(self, first: int, count: int) -> list[KVCache]:
        return [cache.rows(first, count) for cache in self._own]

    def _run(self) -> None:
        """Drafts tokens for every text and runs them through the model."""
        assert self._cache is not None
        found = [self._scored[id(text)] for text in self.texts]
        starts, counts = [one.start for one in found], [one.used for one in found]
        new = max(counts)
        known = Known(
            starts,
            counts,
            pad_sequence([one.hidden[: one.used] for one in found], batch_first=True),
            [torch.stack(tails) for tails in zip(*(one.tails for one in found), strict=True)],
            torch.stack([_followers(text, one, new) for text, one in zip(self.texts, found, strict=True)]),
        )
        drafts, tails = self._drafter.extend(known, self._rows(0, len(self.texts)), self._vocab_size)
        room = min(text.longest - len(text.tokens) for text in self.texts) - 1
        drafts = drafts[:, : min(self._tokens, room)].cpu()
        cache = self._cache.rows(0, len(self.texts))
        cache.set_lengths([held(text, cache) for text in self.texts])
        tokens = torch.cat((torch.tensor([text.tokens[-1:] for text in self.texts]), drafts), 1)
        logits, hidden = self._drafter.logits(tokens, cache)
        self._drafter.counts.proposed += drafts.numel()
        for row, (text, proposed) in enumerate(zip(self.texts, drafts.tolist(), strict=True)):
            own = tuple(tail[row] for tail in tails)
            self._scored[id(text)] = _Scored(starts[row] + counts[row], hidden[row], own, logits[row], tuple(proposed))


def _followers(text: RunningSequence, one: _Scored, new: int) -> Tensor:
    """The token behind each position of a text's last pass that counts, and padding, [new]."""
    return pad(torch.tensor(text.tokens[one.start + 1 :]), (0, new - one.used))
