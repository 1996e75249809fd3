"""What clients may ask for, and what it means: Megatron-LM's `PUT /api` and OpenAI's `POST /v1/completions`.

Sources: Megatron-LM, megatron/core/inference/text_generation_server (fields and limits of /api); OpenAI's API reference
for completions. Fields that cannot be followed here are refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron.inference.sampling import Sampling

Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
MOST_TEXTS = 128
MOST_STOPS = 16
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Strict(BaseModel):
    """Types are meant: "3" is no number. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Completion(Strict):
    """The body of POST /v1/completions."""

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = 1
    best_of: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    stream: bool | None = False
    stream_options: dict[str, bool] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
    user: str | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> Completion:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must equal n: all texts are returned")
        if len(self.prompts()) * (self.n or 1) > MOST_TEXTS:
            raise ValueError(f"at most {MOST_TEXTS} texts a request")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]

    def sampling(self) -> Sampling:
        """How tokens are chosen; temperature 0 takes the likeliest."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature == 0:
            return Sampling(repetition_penalty=self.repetition_penalty)
        top_p = self.top_p if self.top_p is not None and self.top_p < 1 else 0.0
        return Sampling(temperature, self.top_k, top_p, self.min_p, self.repetition_penalty)

    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        stop = self.stop or ()
        return (stop,) if isinstance(stop, str) else tuple(each for each in stop if each)


class MegatronRequest(Strict):
    """The body of PUT /api."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
    tokens_to_generate: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    logprobs: bool = False
    random_seed: Seed | None = None
    stop_on_eol: bool = False
    stop_on_double_eol: bool = False
    no_log: bool = False

    @model_validator(mode="after")
    def _can_be_done(self) -> MegatronRequest:
        if self.top_k > 0 and self.top_p > 0:
            raise ValueError("cannot set both top_k and top_p")
        return self

    def sampling(self) -> Sampling:
        """How tokens are chosen; top_k 1 takes the likeliest."""
        return Sampling() if self.top_k == 1 else Sampling(self.temperature, self.top_k, self.top_p)

    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return ("\n",) if self.stop_on_eol else ("\n\n",) if self.stop_on_double_eol else ()
