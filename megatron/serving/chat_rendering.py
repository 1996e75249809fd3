"""From the messages of a chat request to the tokens that the model reads.

The run's chat template renders them and special tokens that it writes are their ids; nothing is put before its text, as
in `transformers` (apply_chat_template). Parts of a content and the arguments of tool calls are handed over as
megatron/tokenizers/chat_messages.py says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.errors import ConfigError, RunError
from megatron.serving.api_errors import Refused
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.chat_messages import NO_VARIABLES, InvalidToolCall, Shapes
from megatron.tokenizers.chat_template import ChatTemplate, TemplateRefusal


class Conversations:
    """Renders with a template. absent: why there is none, where it is None."""

    def __init__(self, template: ChatTemplate | None = None, absent: str = "there is no chat template") -> None:
        self._template = template
        self._absent = absent
        self._shapes = None if template is None else Shapes(template)
        self._written: dict[str, bool | None] = {}

    @classmethod
    def of_tokenizer(cls, tokenizer_type: str, vocab_file: str | None) -> Conversations:
        """With the template that goes with a run's tokenizer, where there is a usable one."""
        try:
            return cls(ChatTemplate.of_tokenizer(tokenizer_type, vocab_file))
        except ConfigError as error:
            return cls(None, str(error))

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        opens: bool = True,
        goes_on: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of the messages.

        Raises Refused where there is no template, or it cannot render them.

        Args:
            messages: The conversation.
            tools: Tools that the template receives.
            opens: End with what opens an answer.
            goes_on: End inside the last message.
            variables: Of the template.
        """
        if self._template is None or self._shapes is None:
            raise Refused(400, f"this model takes no messages, only prompts (/v1/completions): {self._absent}")
        named = [name for name in variables or () if name in NO_VARIABLES]
        if named:
            raise Refused(400, f"chat_template_kwargs: {named[0]} is no variable to be set there")
        try:
            given = self._shapes.given(self._accepted(self._shapes, messages))
        except InvalidToolCall as error:
            raise Refused(400, f"messages.{error.number}.tool_calls: {error.what}") from None
        how = {"add_generation_prompt": opens, "continue_final_message": goes_on, **(variables or {})}
        try:
            rendered = self._template.render(given, tools=tools, **how)
            if tools and rendered == self._template.render(given, **how):
                raise Refused(400, "tools: the model's chat template has no place for them")
        except (TemplateRefusal, ConfigError) as error:
            raise Refused(400, f"messages: the chat template cannot render them: {error}") from None
        except (RecursionError, TypeError, ValueError, OverflowError) as error:
            raise Refused(400, f"messages: the chat template cannot render them: {error!r}") from None
        return rendered

    def _accepted(self, shapes: Shapes, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages under roles that the template writes, so that none is lost.

        A developer's are the system's where the template knows no developer, as in vLLM. Raises Refused for any other
        role whose words the template leaves out.
        """
        for role in {str(message.get("role")) for message in messages if message.get("content")}:
            if role not in self._written:
                self._written[role] = shapes.writes(role)
        accepted: list[Mapping[str, Any]] = []
        for number, message in enumerate(messages):
            role = str(message.get("role"))
            if role == "developer" and self._written.get(role) is not True:
                message = {**message, "role": "system"}
            elif self._written.get(role) is False:
                raise Refused(400, f"messages.{number}.role: the model's chat template leaves out what a {role} says")
            accepted.append(message)
        return accepted

    def tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """What the model reads of a rendered text, at least one token. Raises Refused for what is no text."""
        try:
            return tokenizer.encode_with_special_tokens(text) or [tokenizer.begin]
        except RunError as error:
            raise Refused(400, f"messages: {error}") from None
        except UnicodeEncodeError:
            raise Refused(400, "messages: what the chat template makes of them is no text") from None
