"""One answer in the making: the tokens that a model adds to a prompt, the text they spell, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron.inference.prompt_encoding import GrowingText, TextBehind
from megatron.inference.sampling import Sampler, Sampling
from megatron.inference.token_loop import Limits, RunningSequence, Step
from megatron.tokenizers.base import Tokenizer, split_at
from megatron.tokenizers.source import reads_sources
from megatron.tokenizers.vocab_limit import known_ids

_LARGE_SHARE = 0.5  # of the context, from which on a prompt is worth a warning


@dataclass(frozen=True)
class GenerationResult:
    """What became of one prompt."""

    context: str
    """The prompt's text."""
    text: str | None
    """What follows it; None when nothing was generated."""
    length: int
    """Of that text [tokens]."""
    finished: bool
    """Whether the model ended the text."""
    message: str | None
    """A warning, or an error."""
    duration_seconds: float
    """Time from the start of the request [s]."""
    failed: bool = False
    """Whether it is an error; text is what came before it."""
    logits: list[list[float]] | None = None
    """Per token of the text the scores of the whole vocabulary, where asked for."""
    cut: bool = False
    """Whether a stop text was cut off, with what its tokens hold behind it."""

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
    """How every text of a run is made."""

    sampling: Sampling
    """How tokens are chosen. maximum_tokens, seq_length [tokens]."""
    seed: int
    """How tokens are chosen. maximum_tokens, seq_length [tokens]."""
    maximum_tokens: int
    """Longest answer [tokens]."""
    seq_length: int
    """Context of the model [tokens]."""
    recompute: bool = False
    """Without a cache."""
    stop: tuple[str, ...] = ()
    """Texts that end a text and are cut off."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end one, besides the end of a document."""
    return_logits: bool = False
    """Keep the scores."""
    batch_size: int = 1
    """Side by side [texts]."""
    alone: bool = False
    """Decode answers without their prompts."""


class GenerationRequest:
    """The continuation of one prompt, token by token.

    Args:
        tokenizer: Tokenizer of the model.
        settings: Settings of generation.
        prompt: Ids of the prompt, at least one.
        context: Text of the prompt for the record.
        text_index: Number of the text in the run, which selects its random numbers.
        stream: Called with each new part of the text as soon as it is complete.
        on_token: Called with each new token of the answer and its scores [v].
        on_end: The same with the token that ends it, which is none of its tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: Settings,
        prompt: Sequence[int],
        context: str = "",
        *,
        text_index: int = 0,
        stream: Callable[[str], None] | None = None,
        on_token: Callable[[int, Tensor], None] | None = None,
        on_end: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._context = context
        self._on_token, self._on_end = on_token, on_end
        self._pieces = Detokenizer(
            tokenizer, settings.stop, stream, () if settings.alone or reads_sources(tokenizer) else prompt
        )
        self._logits: list[list[float]] | None = [] if settings.return_logits else None
        self._started = time.perf_counter()
        self.prompt_tokens = len(prompt)
        self.finished = False
        self.new_tokens: list[int] = []
        # A stop text that is a special token is one token, and leaves no text to be found in.
        spelt = (tokenizer.special_tokens[text] for text in settings.stop if text in tokenizer.special_tokens)
        self._ends = frozenset((tokenizer.eod, *settings.end_ids, *spelt))
        limits = Limits(self._ends, settings.maximum_tokens, settings.seq_length)
        sampler = Sampler(
            settings.sampling,
            vocab_size=known_ids(tokenizer),
            seed=settings.seed,
            text_index=text_index,
            prompt_tokens=len(prompt),
        )
        self.growing = RunningSequence(prompt, limits, sampler)
        self._error: str | None = None

    @property
    def too_long(self) -> bool:
        """Whether the prompt leaves no room in the model's context."""
        return self._settings.maximum_tokens > 0 and self.prompt_tokens >= self._settings.seq_length

    def give_up(self, message: str) -> None:
        """Ends the text before its next token. message: why it failed."""
        self._error = f"error: {message}"
        self.growing.ended = self.growing.failed = True

    def take(self, step: Step) -> bool:
        """Adds a token, if there is one; True when a stop text has ended the answer, although the model would go on."""
        if step.text.failed:
            return False
        if step.token in self._ends:
            self.finished = True
            if self._on_end is not None:
                self._on_end(step.token, step.logits)
            return False
        self.new_tokens.append(step.token)
        if self._logits is not None:
            self._logits.append(step.logits[: self._tokenizer.vocab_size].float().tolist())
        if self._on_token is not None:
            self._on_token(step.token, step.logits)
        self.finished = self._pieces.add(self.new_tokens)
        return self.finished

    def record(self) -> GenerationResult:
        """The outcome, once no more tokens come; streams what was held back."""
        seconds = time.perf_counter() - self._started
        if self.too_long:
            return GenerationResult(self._context, None, 0, False, self._no_room(), seconds, failed=True)
        text = self._pieces.close(self.new_tokens)
        failed = self.growing.failed
        return GenerationResult(
            self._context,
            text if self.new_tokens else None,
            len(self.new_tokens),
            self.finished,
            (self._error or self._no_numbers()) if failed else self._warning(),
            seconds,
            failed,
            logits=self._logits,
            cut=self._pieces.cut,
        )

    def failure(self, message: str) -> GenerationResult:
        """The outcome where something else went wrong; the text is not looked at again."""
        seconds = time.perf_counter() - self._started
        return GenerationResult(
            self._context, None, len(self.new_tokens), False, f"error: {message}", seconds, failed=True
        )

    def _no_numbers(self) -> str:
        return (
            f"error: the model's scores of new token {len(self.new_tokens) + 1} are not numbers (NaN or infinite); "
            "look for such values in the checkpoint, or for an overflow in its precision"
        )

    def _no_room(self) -> str:
        return (
            f"error: the prompt has {self.prompt_tokens} tokens, which leaves no room in the model's context of "
            f"{self._settings.seq_length} tokens (seq_length); shorten the prompt"
        )

    def _warning(self) -> str | None:
        if self.prompt_tokens < _LARGE_SHARE * self._settings.seq_length:
            return None
        return (
            f"warning: the prompt has {self.prompt_tokens} of the {self._settings.seq_length} tokens of the model's "
            "context (seq_length), which may leave little room"
        )


class Detokenizer:
    """The text of the tokens so far: streams what is complete, and finds the stop texts.

    A stop text may hold special tokens, which leave no text: it is sought where they are spelt.

    Args:
        tokenizer: Tokenizer of the model.
        stop: Texts that end the answer.
        stream: Called with each new part of the text; None streams nothing.
        prompt: Ids before the text; none to decode it alone.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        stream: Callable[[str], None] | None,
        prompt: Sequence[int] = (),
    ) -> None:
        self._text = TextBehind(tokenizer, prompt)
        self._growing = GrowingText(tokenizer, prompt)
        self._stop = [text for text in stop if text]
        special = tokenizer.special_tokens
        others = (text for text in self._stop if text not in special)  # those that are ordinary, or only in part
        mixed = [text for text in others if any(number is not None for _, number in split_at(text, special))]
        self._spelling = Spelling(self._text, special, mixed)
        self._stream = stream
        self._streamed = 0
        self._cut: str | None = None

    def add(self, tokens: list[int]) -> bool:
        """Whether a stop text has appeared."""
        if not self._stop and self._stream is None:
            return False
        text = self._growing.text(tokens)
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if self._spelling.stops:
            found += self._spelling.find(tokens)
        if found:
            self._cut = text[: min(found)]
            self._send(self._cut, len(self._cut))
            return True
        self._send(text, self._complete(text))
        return False

    @property
    def cut(self) -> bool:
        """Whether a stop text has been cut off."""
        return self._cut is not None

    def close(self, tokens: list[int]) -> str:
        """The whole text."""
        text = self._text.text(tokens) if self._cut is None else self._cut
        self._send(text, len(text))
        return text

    def _complete(self, text: str) -> int:
        """How much of the text later tokens cannot change: not a half character, nor the start of a stop text."""
        complete = len(text.rstrip("\ufffd"))
        for stop in self._stop:
            for size in range(min(len(stop) - 1, complete), 0, -1):
                if text.endswith(stop[:size], 0, complete):
                    complete -= size
                    break
        return complete

    def _send(self, text: str, end: int) -> None:
        if self._stream is not None and end > self._streamed:
            self._stream(text[self._streamed : end])
            self._streamed = end


class Spelling:
    """Finds stop texts that hold special tokens. behind: decodes an answer. special: text -> id."""

    def __init__(self, behind: TextBehind, special: Mapping[str, int], stops: Sequence[str]) -> None:
        self._behind = behind
        self._texts = {number: text for text, number in special.items()}
        self.stops = tuple(stops)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Where in the ordinary text of the tokens stop texts begin [characters]."""
        spelt, offsets, plain = "", [], 0
        for at, token in enumerate(tokens):
            if (text := self._texts.get(token)) is not None:
                ordinary = self._behind.text(tokens[:at])
                offsets += [*range(plain, len(ordinary)), *[len(ordinary)] * len(text)]
                spelt += ordinary[plain:] + text
                plain = len(ordinary)
        ordinary = self._behind.text(tokens)
        offsets += range(plain, len(ordinary))
        spelt += ordinary[plain:]
        return [offsets[at] for at in map(spelt.find, self.stops) if at >= 0]
