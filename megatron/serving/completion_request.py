"""The body of OpenAI's `POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from megatron.serving.requests import MOST_TEXTS, Generation, Never, Tokens


class Completion(Generation):
    """The body of POST /v1/completions. `max_tokens` may be 0 where the prompt is wanted back (`echo`)."""

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    best_of: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    suffix: Never = None

    @model_validator(mode="after")
    def _can_be_done(self) -> Completion:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must equal n: all texts are returned")
        if len(self.prompts()) * (self.n or 1) > MOST_TEXTS:
            raise ValueError(f"at most {MOST_TEXTS} texts a request")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or 0 with echo")
        return self

    def new(self, own: int | None) -> int | None:
        """The most tokens of an answer; None for the service's own limit. own: that limit."""
        return None if own is not None and "max_tokens" not in self.model_fields_set else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """The prompts, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]
