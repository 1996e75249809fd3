"""Text after text from one model: prompts in, records out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.engine.engine import Engine
from megatron.inference.decode import Limits, decode
from megatron.inference.sampling import Sampler, Sampling
from megatron.tokenizers.base import Tokenizer

_LARGE_SHARE = 0.5  # of the context, from which on a prompt is worth a warning


@dataclass(frozen=True)
class Record:
    """What became of one prompt.

    context: the prompt's text. text: what follows it; None when nothing was generated. length [tokens]: of that text.
    finished: whether the model ended the text. message: a warning, or why nothing was generated. failed: the latter.
    logits: per token of the text the scores of the whole vocabulary, where asked for.
    """

    context: str
    text: str | None
    length: int
    finished: bool
    message: str | None
    duration_seconds: float
    failed: bool = False
    logits: list[list[float]] | None = None

    def as_json(self) -> dict[str, object]:
        """The public fields."""
        fields: dict[str, object] = {
            "context": self.context,
            "text": self.text,
            "length": self.length,
            "finished": self.finished,
            "message": self.message,
            "duration_seconds": self.duration_seconds,
        }
        if self.logits is not None:
            fields["logits"] = self.logits
        return fields


@dataclass(frozen=True)
class Settings:
    """How every text of a run is made.

    sampling and seed: how tokens are chosen. maximum_tokens, seq_length [tokens]. recompute: without a cache. stop:
    texts that end a text and are cut off. return_logits: keep the scores.
    """

    sampling: Sampling
    seed: int
    maximum_tokens: int
    seq_length: int
    recompute: bool = False
    stop: tuple[str, ...] = ()
    return_logits: bool = False


class TextGenerator:
    """Continues prompts, one after another, each as if it were the only one. Collective over the model's ranks."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._limits = Limits(tokenizer.eod, settings.maximum_tokens, settings.seq_length)
        self._cache = None if settings.recompute else engine.new_cache(1, settings.seq_length)

    def continue_text(
        self, context: str, *, text_index: int = 0, stream: Callable[[str], None] | None = None
    ) -> Record:
        """The record of one prompt. An empty context starts a document.

        text_index: the number of the text in the run, which picks its random numbers. stream: is handed each new piece
        of text as soon as it is whole.
        """
        prompt = self._tokenizer.encode(context) or [self._tokenizer.eod]
        return self.continue_tokens(prompt, context, text_index=text_index, stream=stream)

    def continue_tokens(
        self,
        prompt: Sequence[int],
        context: str = "",
        *,
        text_index: int = 0,
        stream: Callable[[str], None] | None = None,
    ) -> Record:
        """As `continue_text`, of a context that is tokens already, at least one; `context` is what the record says."""
        started = time.perf_counter()
        problem = self._too_long(len(prompt))
        if problem is not None:
            return Record(context, None, 0, False, problem, time.perf_counter() - started, failed=True)
        settings = self._settings
        sampler = Sampler(
            settings.sampling, vocab_size=self._tokenizer.vocab_size, seed=settings.seed, text_index=text_index
        )
        pieces = _Pieces(self._tokenizer, settings.stop, stream)
        tokens: list[int] = []
        logits: list[list[float]] | None = [] if settings.return_logits else None
        finished = False
        for step in decode(self._engine, prompt, limits=self._limits, sampler=sampler, cache=self._cache):
            finished = step.token == self._limits.eod
            if finished:
                break
            tokens.append(step.token)
            if logits is not None:
                logits.append(step.logits[: self._tokenizer.vocab_size].float().tolist())
            if pieces.add(tokens):
                finished = True
                break
        text = pieces.close(tokens)
        return Record(
            context,
            text if tokens else None,
            len(tokens),
            finished,
            self._warning(len(prompt)),
            time.perf_counter() - started,
            logits=logits,
        )

    def _too_long(self, prompt_tokens: int) -> str | None:
        if prompt_tokens < self._settings.seq_length:
            return None
        return (
            f"error: the prompt has {prompt_tokens} tokens, which leaves no room in the model's context of "
            f"{self._settings.seq_length} tokens (seq_length); shorten the prompt"
        )

    def _warning(self, prompt_tokens: int) -> str | None:
        if prompt_tokens < _LARGE_SHARE * self._settings.seq_length:
            return None
        return (
            f"warning: the prompt has {prompt_tokens} of the {self._settings.seq_length} tokens of the model's context "
            "(seq_length), which may leave little room"
        )


class _Pieces:
    """The text of the tokens so far: streams what is whole, and finds the stop texts."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stream: Callable[[str], None] | None) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._stream = stream
        self._streamed = 0
        self._cut: str | None = None

    def add(self, tokens: list[int]) -> bool:
        """Whether a stop text has appeared."""
        if not self._stop and self._stream is None:
            return False
        text = self._tokenizer.decode(tokens)
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._cut = text[: min(found)]
            self._send(self._cut, len(self._cut))
            return True
        self._send(text, self._whole(text))
        return False

    def close(self, tokens: list[int]) -> str:
        """The whole text."""
        text = self._tokenizer.decode(tokens) if self._cut is None else self._cut
        self._send(text, len(text))
        return text

    def _whole(self, text: str) -> int:
        """How much of the text later tokens cannot change: not a half character, nor the start of a stop text."""
        whole = len(text.rstrip("\ufffd"))
        for stop in self._stop:
            for size in range(min(len(stop) - 1, whole), 0, -1):
                if text.endswith(stop[:size], 0, whole):
                    whole -= size
                    break
        return whole

    def _send(self, text: str, end: int) -> None:
        if self._stream is not None and end > self._streamed:
            self._stream(text[self._streamed : end])
            self._streamed = end
