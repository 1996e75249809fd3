"""From the messages of a chat request to the tokens that the model reads.

The run's chat template renders them and special tokens that it writes are their ids; nothing is put before its text, as
in `transformers` (apply_chat_template). Two things are vLLM's: a content given as parts is handed to a template that
knows parts as it is, and to any other as one text, the parts joined by line ends; the arguments of tool calls, which
are JSON in a string, are handed over as what they say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.errors import ConfigError, RunError
from megatron.serving.failures import Refused
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.chat_template import ChatTemplate, TemplateRefusal

_OWN = ("self", "messages", "tools", "add_generation_prompt", "continue_final_message")
"""Variables of a template that a request says by its own fields."""
_PROBE = "probe"


class Conversations:
    """Renders with a template. absent: why there is none, where it is None."""

    def __init__(self, template: ChatTemplate | None = None, absent: str = "there is no chat template") -> None:
        self._template = template
        self._absent = absent
        self._takes_parts = template is not None and _takes_parts(template)

    @classmethod
    def of_tokenizer(cls, tokenizer_type: str, vocab_file: str | None) -> Conversations:
        """With the template that goes with a run's tokenizer, where there is a usable one."""
        try:
            return cls(ChatTemplate.of_tokenizer(tokenizer_type, vocab_file))
        except ConfigError as fault:
            return cls(None, str(fault))

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

        opens: end with what opens an answer. goes_on: end inside the last message. variables: of the template. Raises
        Refused where there is no template, or it cannot render them.
        """
        if self._template is None:
            raise Refused(400, f"this model takes no messages, only prompts (/v1/completions): {self._absent}")
        named = [name for name in variables or () if name in _OWN]
        if named:
            raise Refused(400, f"chat_template_kwargs: {named[0]} is no variable to be set there")
        given = [self._given(number, message) for number, message in enumerate(messages)]
        how = {"add_generation_prompt": opens, "continue_final_message": goes_on, **(variables or {})}
        try:
            rendered = self._template.render(given, tools=tools, **how)
            if tools and rendered == self._template.render(given, **how):
                raise Refused(400, "tools: the model's chat template has no place for them")
        except (TemplateRefusal, ConfigError) as fault:
            raise Refused(400, f"messages: the chat template cannot render them: {fault}") from None
        except (RecursionError, TypeError, ValueError, OverflowError) as fault:
            raise Refused(400, f"messages: the chat template cannot render them: {fault!r}") from None
        return rendered

    def tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """What the model reads of a rendered text, at least one token. Raises Refused for what is no text."""
        try:
            return tokenizer.encode_with_special_tokens(text) or [tokenizer.begin]
        except RunError as fault:
            raise Refused(400, f"messages: {fault}") from None
        except UnicodeEncodeError:
            raise Refused(400, "messages: what the chat template makes of them is no text") from None

    def _given(self, number: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as the template wants it."""
        given = dict(message)
        content = given.get("content")
        if isinstance(content, list) and not self._takes_parts:
            given["content"] = "\n".join(part["text"] for part in content)
        if given.get("tool_calls"):
            given["tool_calls"] = [_called(number, call) for call in given["tool_calls"]]
        return given


def _called(number: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are what the JSON in them says."""
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return dict(call)
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as fault:
        where = f"messages.{number}.tool_calls"
        raise Refused(400, f"{where}: the arguments of {function.get('name')} are no JSON ({fault})") from None
    return {**call, "function": {**function, "arguments": read}}


def _takes_parts(template: ChatTemplate) -> bool:
    """Whether a template writes the text of a content that is given as parts, and not the parts themselves."""
    try:
        text = template.render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
    except (TemplateRefusal, ConfigError):
        return False
    return _PROBE in text and "'type'" not in text and '"type"' not in text
