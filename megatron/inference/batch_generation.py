"""Text after text from one model: prompts in, records out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron.engine.engine import Engine
from megatron.inference.generation_request import GenerationRequest, GenerationResult, Settings
from megatron.inference.prompt_encoding import read_prompt
from megatron.inference.token_loop import TokenLoop, decode
from megatron.tokenizers.base import Tokenizer


class TextGenerator:
    """Continues prompts, each as if it were the only one. Collective over the model's ranks.

    Args:
        engine: Computes logits.
        tokenizer: Of the model.
        settings: How texts grow, and where they end.
        make: Makes a token loop.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, settings: Settings, make: Callable[..., TokenLoop] = TokenLoop
    ) -> None:
        self._engine, self._make = engine, make
        self._tokenizer = tokenizer
        self._settings = settings

    def continue_all(self, contexts: Sequence[str]) -> Iterator[GenerationResult]:
        """The record of each prompt, in order; the number of a prompt picks its random numbers.

        An empty context starts a document. Prompts run side by side, the longest first, so records may come in bursts.
        """
        prompts = [read_prompt(self._tokenizer, context) for context in contexts]
        return self.continue_tokens(prompts, range(len(prompts)), contexts)

    def continue_tokens(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], contexts: Sequence[str] | None = None
    ) -> Iterator[GenerationResult]:
        """As `continue_all`, of prompts that are tokens already, at least one each. numbers: of the texts."""
        settings = self._settings
        answers = [
            GenerationRequest(self._tokenizer, settings, prompt, context, text_index=number)
            for prompt, number, context in zip(prompts, numbers, contexts or [""] * len(prompts), strict=True)
        ]
        owners = {id(answer.growing): answer for answer in answers}
        done = {id(answer): answer.record() for answer in answers if answer.growing.ended}
        order = iter(answers)
        following = next(order, None)
        steps = decode(
            self._engine,
            [answer.growing for answer in answers],
            rows=settings.batch_size,
            cached=not settings.recompute,
            make=self._make,
        )
        while following is not None:
            while following is not None and id(following) in done:
                yield done.pop(id(following))
                following = next(order, None)
            if following is None:
                return
            step = next(steps)
            answer = owners[id(step.text)]
            if answer.take(step):
                step.text.end()
            if step.text.ended:
                done[id(answer)] = answer.record()

    def read(self, context: str) -> list[int]:
        """The tokens of a context. RunError where the model does not know one of them."""
        return read_prompt(self._tokenizer, context)

    def fits(self, context: str) -> bool:
        """Whether a context leaves room for a whole answer, or for half of the model's context."""
        settings = self._settings
        room = min(settings.maximum_tokens, settings.seq_length // 2)
        return len(self.read(context)) + room <= settings.seq_length

    def continue_text(
        self,
        context: str,
        *,
        text_index: int = 0,
        stream: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> GenerationResult:
        """The record of one prompt.

        Args:
            context: The prompt as text.
            text_index: Number of the text, which seeds its sampler.
            stream: Is handed each new piece of text as soon as it is whole.
            interrupted: Asked before each token, with the same answer on every rank, whether to leave it at that.
        """
        prompt = self.read(context)
        answer = GenerationRequest(
            self._tokenizer, self._settings, prompt, context, text_index=text_index, stream=stream
        )
        text = answer.growing
        if text.ended:
            return answer.record()
        loop = self._make(self._engine, rows=1, max_length=text.longest, cached=not self._settings.recompute)
        steps = loop.join([text])
        while not answer.take(steps[0]) and not text.ended and not interrupted():
            steps = loop.step()
        return answer.record()
