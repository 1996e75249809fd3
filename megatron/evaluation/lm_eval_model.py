"""Our engine as the `LM` of lm-eval.

Only this file and tasks.py import lm_eval. Source: lm-eval 0.4.13, lm_eval/api/model.py for what each method promises,
and lm_eval/models/huggingface.py for how contexts are read, cut and parted, so that scores agree with its own `hf`
model: special tokens that a context spells are their ids, the tokenizer's own begin token is before it, and
`prefix_token_id` before a text without context and before a rolling one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from megatron.distributed.mesh import Axis
from megatron.engine.engine import Engine
from megatron.errors import ConfigError, RunError
from megatron.evaluation.arguments import read_arguments
from megatron.evaluation.progress import Progress
from megatron.evaluation.work_split import split_over_replicas
from megatron.inference.batch_generation import TextGenerator
from megatron.inference.generation_request import GenerationResult, Settings
from megatron.inference.prompt_encoding import read_prompt, read_text
from megatron.inference.sampling import Sampling
from megatron.inference.scoring import NotNumbers, Pair, Score, require_numbers, score, too_long, windows
from megatron.log import get_logger
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.chat_template import ChatTemplate, TemplateRefusal


class HarnessModel(LM):
    """Answers lm-eval's requests with an engine. Collective: every rank must get the same requests.

    Args:
        engine: Computes logits.
        tokenizer: Tokenizer of the model.
        max_length: Context length [tokens].
        batch_size: Texts in one forward pass; scores do not depend on it.
        seed: Seed of sampling.
        replicas: Axis of the copies of the model, which share the requests.
        cached: Whether generation may use a cache of keys and values.
        chat: Template for `eval_chat_template`.
        name: Name of the tokenizer, which cached requests are stored under.
        end_ids: Ids that end a generated text, besides the end of a document.
        vocabulary: Number of ids that exist; the tokenizer's unless given.
        sampling: The model's own settings, for what a task does not say.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
        seed: int = 0,
        replicas: Axis | None = None,
        cached: bool = True,
        chat: ChatTemplate | None = None,
        name: str = "tokenizer",
        end_ids: Sequence[int] = (),
        vocabulary: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__()
        self._engine = engine
        self._text_tokenizer = tokenizer
        self.max_length = max_length
        self._warned: set[int] = set()
        self.batch_size = batch_size
        self._seed = seed
        self._replicas = replicas or Axis("data")
        self._cached = cached
        self._chat = chat
        self._name = name
        self._end_ids = tuple(end_ids)
        self._vocabulary = vocabulary or tokenizer.vocab_size
        self._sampling = sampling or Sampling()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._text_tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """The token that is before a text without context, and before a rolling one."""
        return self._text_tokenizer.begin

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context: the log-likelihood [nats], and whether greedy decoding gives it."""
        pairs = [self._pair(*request.args) for request in requests]
        self._warn_truncated(too_long(pairs, self.max_length), len(pairs))
        scores = self._score(pairs)
        require_numbers(scores, "answers")
        answers = [(each.log_likelihood, each.greedy) for each in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood [nats] of each whole text, every token scored once, in windows of the model's context."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for pair in windows([self.prefix_token_id], read_text(self._text_tokenizer, text), self.max_length):
                pairs.append(pair)
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._score(pairs)
        require_numbers(scores, "windows of text")
        for owner, each in zip(owners, scores, strict=True):
            totals[owner] += each.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to one of the texts in `until`, which is left out."""
        asked = [
            Asked(number, read_prompt(self._text_tokenizer, context), self._settings(arguments))
            for number, (context, arguments) in enumerate(request.args for request in requests)
        ]
        self._warn_truncated(sum(len(each.tokens) > self._room(each.settings) for each in asked), len(asked))
        records = split_over_replicas(asked, self._write, self._replicas, size=lambda each: len(each.tokens))
        failed = [record.message for record in records if record.failed]
        if failed:
            raise NotNumbers.of(f"{len(failed)} of {len(records)} contexts could not be continued ({failed[0]})")
        answers = [record.text or "" for record in records]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        assert self._chat is not None, "lm-eval asks only where eval_chat_template is set"
        write_line = partial(
            self._chat.render,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return write_line(chat_history)
        except TemplateRefusal:
            pass  # some templates know no system; the harness then leaves it out
        try:
            return write_line([turn for turn in chat_history if turn["role"] != "system"])
        except TemplateRefusal as error:
            what = f"the chat template refuses the conversation: {error}"
            raise ConfigError.of(what, key="eval_chat_template", value=True) from error

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, which lm-eval keeps with the results."""
        return None if self._chat is None else self._chat.source

    @property
    def tokenizer_name(self) -> str:
        """What cached requests of this tokenizer are kept under."""
        return self._name

    def _write(self, asked: Sequence[Asked]) -> list[GenerationResult]:
        """The answers, those with equal settings side by side."""
        records: dict[int, GenerationResult] = {}
        kinds: dict[Settings, list[Asked]] = {}
        for each in asked:
            kinds.setdefault(each.settings, []).append(each)
        progress = Progress("generating")
        for settings, some in kinds.items():
            generator = TextGenerator(self._engine, self._text_tokenizer, settings)
            numbers = [each.number for each in some]
            prompts = [each.tokens[-self._room(settings) :] for each in some]
            for number, record in zip(numbers, generator.continue_tokens(prompts, numbers), strict=True):
                records[number] = record
                progress(len(records) / len(asked))
        return [records[each.number] for each in asked]

    def _room(self, settings: Settings) -> int:
        """How many tokens of a context fit beside the answer."""
        return self.max_length - settings.maximum_tokens

    def _warn_truncated(self, cut: int, number: int) -> None:
        if cut:
            get_logger(__name__).info(
                "%d of %d contexts do not fit the model's context of %d tokens and are cut on their left",
                cut,
                number,
                self.max_length,
            )

    def _shortened(self, requested: int) -> int:
        """Half of what the model holds, for answers that ask for all of it or more [tokens]; one warning for each
        length.
        """
        length = self.max_length // 2
        if requested not in self._warned:
            self._warned.add(requested)
            get_logger(__name__).warning(
                "a task asks for answers of up to %d tokens, and the model's context is %d: they end after %d",
                requested,
                self.max_length,
                length,
            )
        return length

    def _score(self, pairs: Sequence[Pair]) -> list[Score]:
        work = partial(
            score,
            self._engine,
            max_length=self.max_length,
            batch_size=self.batch_size,
            padding=self.eot_token_id,
            vocabulary=self._vocabulary,
            on_progress=Progress("scoring"),
        )
        return split_over_replicas(pairs, work, self._replicas, size=lambda pair: len(pair.inputs()))

    def _pair(self, context: str, continuation: str) -> Pair:
        """Context and continuation as tokens, parted where the tokens of the context alone end.

        White space at the end of the context belongs to the continuation, as tokenizers put it before the next word.
        """
        tokenizer = self._text_tokenizer
        if not context:
            tokens = tuple(tokenizer.encode_with_special_tokens(continuation))
            begun = len(tokens) > 1 and tokens[0] == self.prefix_token_id
            return self._full(tokens[:1], tokens[1:]) if begun else self._full((), tokens)
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        full, before = read_text(tokenizer, stripped + continuation), read_text(tokenizer, stripped)
        # What joins the context's last token, as in languages without blanks, is scored as tokens of its own.
        after = full[len(before) :] or tokenizer.encode_with_special_tokens(continuation)
        return self._full(tuple(before), tuple(after))

    def _full(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> Pair:
        if not continuation:
            raise RunError.of("a task asks how likely an answer without text is", hint="give each answer some text")
        return Pair(context or (self.prefix_token_id,), continuation)

    def _settings(self, arguments: Mapping[str, Any]) -> Settings:
        """What a task's generation arguments mean here. Raises RunError for one that cannot be followed."""
        try:
            requested = read_arguments(arguments, own=self._sampling)
        except ConfigError as error:  # of a task that was not checked when it was loaded
            raise RunError(*error.issues) from error
        length = requested.maximum_tokens
        if length >= self.max_length:  # the context needs a place too
            length = self._shortened(length)
        return Settings(
            sampling=requested.sampling,
            seed=self._seed,
            maximum_tokens=length,
            seq_length=self.max_length,
            stop=requested.until,
            end_ids=self._end_ids,
            batch_size=self.batch_size,
            recompute=not self._cached,
            alone=True,
        )


@dataclass(frozen=True)
class Asked:
    """A context to go on with."""

    number: int
    """Of the request."""
    tokens: list[int]
    """The context."""
    settings: Settings
    """Generation settings."""
