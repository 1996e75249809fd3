"""Our engine as the `LM` of lm-eval.

Only this file and tasks.py import lm_eval. Source: lm-eval 0.4.13, lm_eval/api/model.py for what each method promises,
and lm_eval/models/huggingface.py for how contexts are cut and parted, so that scores agree with its own `hf` model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from megatron.engine.engine import Engine
from megatron.errors import ConfigError, RunError
from megatron.evaluation.progress import Progress
from megatron.evaluation.sharing import share_out
from megatron.inference.answer import Settings
from megatron.inference.generate import TextGenerator
from megatron.inference.sampling import Sampling
from megatron.inference.scoring import Pair, Score, score, windows
from megatron.parallel.topology import Axis
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.chat_template import ChatTemplate, TemplateRefusal

_DEFAULT_NEW_TOKENS = 256  # lm-eval's own, where a task does not say
_GENERATION_KEYS = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p")


class HarnessModel(LM):
    """Answers lm-eval's requests with an engine. Collective: every rank is asked the same.

    batch_size [samples]: texts in one forward pass; scores do not depend on it. max_length [tokens]: of the context.
    replicas: the axis of the model's copies, which share the requests out. cached: whether generation may keep keys and
    values. chat: the template for `eval_chat_template`. name: of the tokenizer, which cached requests are kept under.
    end_ids: tokens that end a generated text, besides the end of a document.
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
    ) -> None:
        super().__init__()
        self._engine = engine
        self._text_tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self._seed = seed
        self._replicas = replicas or Axis("data")
        self._cached = cached
        self._chat = chat
        self._name = name
        self._end_ids = tuple(end_ids)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; it also stands before a text without context."""
        return self._text_tokenizer.eod

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context: the log-likelihood [nats], and whether greedy decoding gives it."""
        scores = self._score([self._pair(*request.args) for request in requests])
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
            for pair in windows([self.eot_token_id], self._text_tokenizer.encode(text), self.max_length):
                pairs.append(pair)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, each in zip(owners, self._score(pairs), strict=True):
            totals[owner] += each.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to one of the texts in `until`, which is left out."""
        asked = [(number, *request.args) for number, request in enumerate(requests)]
        answers = share_out(asked, self._write, self._replicas, size=lambda item: len(item[1]))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        assert self._chat is not None, "lm-eval asks only where eval_chat_template is set"
        told = partial(
            self._chat.render,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return told(chat_history)
        except TemplateRefusal:
            pass  # some templates know no system; the harness then leaves it out
        try:
            return told([turn for turn in chat_history if turn["role"] != "system"])
        except TemplateRefusal as fault:
            what = f"the chat template refuses the conversation: {fault}"
            raise ConfigError.of(what, key="eval_chat_template", value=True) from fault

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, which lm-eval keeps with the results."""
        return None if self._chat is None else self._chat.source

    @property
    def tokenizer_name(self) -> str:
        """What cached requests of this tokenizer are kept under."""
        return self._name

    def _write(self, asked: Sequence[tuple[int, str, Mapping[str, Any]]]) -> list[str]:
        """The answers to (number, context, arguments), those with equal arguments side by side."""
        answers: dict[int, str] = {}
        kinds: dict[Settings, list[tuple[int, str]]] = {}
        for number, context, arguments in asked:
            kinds.setdefault(self._settings(arguments), []).append((number, context))
        progress = Progress("generating")
        for settings, texts in kinds.items():
            generator = TextGenerator(self._engine, self._text_tokenizer, settings)
            numbers = [number for number, _ in texts]
            prompts = [self._prompt(context, settings) for _, context in texts]
            for number, record in zip(numbers, generator.continue_tokens(prompts, numbers), strict=True):
                answers[number] = record.text or ""
                progress(len(answers) / len(asked))
        return [answers[number] for number, *_ in asked]

    def _score(self, pairs: Sequence[Pair]) -> list[Score]:
        work = partial(
            score,
            self._engine,
            max_length=self.max_length,
            batch_size=self.batch_size,
            padding=self.eot_token_id,
            on_progress=Progress("scoring"),
        )
        return share_out(pairs, work, self._replicas, size=lambda pair: len(pair.inputs()))

    def _pair(self, context: str, continuation: str) -> Pair:
        """Context and continuation as tokens, parted where the tokens of the context alone end.

        White space at the end of the context belongs to the continuation, as tokenizers put it before the next word.
        """
        encode = self._text_tokenizer.encode
        if not context:
            return Pair((self.eot_token_id,), tuple(encode(continuation)))
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole, before = encode(stripped + continuation), encode(stripped)
        if not before:  # nothing but white space
            return Pair((self.eot_token_id,), tuple(whole))
        return Pair(tuple(before), tuple(whole[len(before) :]))

    def _prompt(self, context: str, settings: Settings) -> list[int]:
        """The tokens of a context. One that leaves too little room is cut on its left."""
        tokens = self._text_tokenizer.encode(context) or [self.eot_token_id]
        return tokens[-(self.max_length - settings.maximum_tokens) :]

    def _settings(self, arguments: Mapping[str, Any]) -> Settings:
        """What a task's generation arguments mean here. Raises RunError for one that cannot be followed."""
        unknown = sorted(arguments.keys() - set(_GENERATION_KEYS))
        if unknown:
            raise RunError.of(
                f"a task asks for {', '.join(unknown)}, which cannot be done here",
                key="generation_kwargs",
                remedy=f"a task may set {', '.join(_GENERATION_KEYS)}",
            )
        until = arguments.get("until") or ()
        wanted = int(arguments.get("max_gen_toks", arguments.get("max_new_tokens", _DEFAULT_NEW_TOKENS)))
        if wanted >= self.max_length:  # more than the model can hold; half of it is left to the context
            wanted = self.max_length // 2
        return Settings(
            sampling=_sampling(arguments),
            seed=self._seed,
            maximum_tokens=wanted,
            seq_length=self.max_length,
            stop=(until,) if isinstance(until, str) else tuple(until),
            end_ids=self._end_ids,
            batch_size=self.batch_size,
            recompute=not self._cached,
        )


def _sampling(arguments: Mapping[str, Any]) -> Sampling:
    """Greedy unless a task samples: with `do_sample`, or a temperature where that is left out."""
    temperature = float(arguments.get("temperature") or 0.0)
    if not arguments.get("do_sample", temperature > 0):
        return Sampling()
    return Sampling(
        temperature=temperature or 1.0,
        top_k=int(arguments.get("top_k") or 0),
        top_p=float(arguments.get("top_p") or 0.0),
        min_p=float(arguments.get("min_p") or 0.0),
    )
