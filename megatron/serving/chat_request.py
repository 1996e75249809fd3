"""The body of OpenAI's `POST /v1/chat/completions`, with vLLM's fields for templates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron.serving.requests import Generation, Never, Strict


class TextPart(Strict):
    """A part of a content; other kinds than text cannot be read."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _said(cls, part: Any) -> Any:
        return _without_cache_hints(part) if isinstance(part, dict) else part


_NOTHING_IN = ("annotations", "tool_calls")
"""Lists of a message that say nothing where they are empty."""


def _without_cache_hints(said: dict[str, Any]) -> dict[str, Any]:
    """What a message or a part says beside where a service may cache it, which changes no answer."""
    return {name: value for name, value in said.items() if name != "cache_control"}


class Message(Strict):
    """One message, as the template gets it. Which roles there are is the template's own matter.

    Fields that say nothing are taken, whatever their names: clients hand answers back with all that they know of.
    """

    role: Annotated[str, Field(min_length=1)]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    audio: Never = None
    function_call: Never = None
    refusal: Never = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        return {
            name: value
            for name, value in _without_cache_hints(message).items()
            if value is not None and not (name in _NOTHING_IN and value == [])
        }


class ResponseFormat(Strict):
    """Answers are plain text."""

    type: Literal["text"]


class Chat(Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    store: Literal[False] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    audio: Never = None
    function_call: Never = None
    functions: Never = None
    metadata: Never = None
    moderation: Never = None
    prediction: Never = None
    prompt_cache_options: Never = None
    prompt_cache_retention: Never = None
    reasoning_effort: Never = None
    service_tier: Never = None
    verbosity: Never = None
    web_search_options: Never = None

    @model_validator(mode="after")
    def _can_be_done(self) -> Chat:
        lengths = {each for each in (self.max_tokens, self.max_completion_tokens) if each is not None}
        if len(lengths) > 1:
            raise ValueError("max_tokens and max_completion_tokens say the same thing and differ")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs only")
        if self.add_generation_prompt and self.continue_final_message and self._says("add_generation_prompt"):
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        if (self.tool_choice == "auto" or self.parallel_tool_calls) and not self.tools:
            raise ValueError("tool_choice and parallel_tool_calls go with tools only")
        return self

    def _says(self, name: str) -> bool:
        return name in self.model_fields_set

    @property
    def new(self) -> int | None:
        """The most tokens of an answer; None for the service's own limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the template receives."""
        return None if self.tool_choice == "none" else self.tools or None

    def turns(self) -> list[dict[str, Any]]:
        """The messages, without what they leave out."""
        return [message.model_dump(exclude_unset=True) for message in self.messages]
