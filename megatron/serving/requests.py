"""What clients may ask for, and what it means: what all requests share, and Megatron-LM's `PUT /api`.

Sources: Megatron-LM, megatron/core/inference/text_generation_server (fields and limits of /api); OpenAI's API reference
for completions and chat; vLLM for the fields that neither has. Fields that cannot be followed here are refused by name,
never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from megatron.inference.sampling import Sampling

Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
MOST_TEXTS = 128
MOST_STOPS = 16
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1)]
Bias = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]


def _nothing(value: object) -> None:
    if value is not None:
        raise ValueError("cannot be followed here; leave it out")


Never = Annotated[None, BeforeValidator(_nothing)]
"""A field that may only be null."""


class Strict(BaseModel):
    """Types are meant: "3" is no number. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Body(Strict):
    """A whole body, whose strings are texts: JSON can also spell halves of surrogate pairs, which are none."""

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, body: Any) -> Any:
        left = [("", body)]
        while left:
            name, value = left.pop()
            if isinstance(value, dict):
                left += [(name or str(key), each) for key, each in value.items()]
                left += [("the name of a field", key) for key in value]
            elif isinstance(value, list):
                left += [(name, each) for each in value]
            elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"{name} holds half of a surrogate pair, which is no text")
        return body


class StreamOptions(Strict):
    """What a stream says besides pieces of text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> StreamOptions:
        if self.include_obfuscation:
            raise ValueError("include_obfuscation cannot be followed here; leave it out")
        return self


class Generation(Body):
    """What completions and chat completions share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Penalty | None = 0.0
    presence_penalty: Penalty | None = 0.0
    logit_bias: Bias | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _streams(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream only")
        return self

    def sampling(self, own: Sampling | None = None) -> Sampling:
        """How tokens are chosen; temperature 0 and top_p 0 take the likeliest.

        own: the model's settings, for what the request leaves out; 1 is the temperature where they have none either.
        """
        own = own or Sampling()
        temperature = (own.temperature or 1.0) if self.temperature is None else self.temperature
        top_p = own.top_p if self.top_p is None else self.top_p
        cold = temperature == 0 or self.top_p == 0
        return Sampling(
            0.0 if cold else temperature,
            0 if cold else max(0, own.top_k if self.top_k is None else self.top_k),
            0.0 if cold or top_p == 1 else top_p,
            0.0 if cold else own.min_p if self.min_p is None else self.min_p,
            self.repetition_penalty or own.repetition_penalty,
            self.frequency_penalty or 0.0,
            self.presence_penalty or 0.0,
            tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
        )

    def stops(self, own: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The texts that end an answer. own: the model's, for a request that leaves them out."""
        if self.stop is None:
            return own
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class MegatronRequest(Body):
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
