"""Messages as a chat template wants them: parts of a content, and the arguments of tool calls.

Training data and the text service hand messages over as they are, as `transformers` does (apply_chat_template), but for
two shapes that templates differ in. A content given as parts goes as it is to a template that writes the texts of
parts, and to any other as one text, the parts joined by line ends, as in vLLM. A text goes to a template that writes
parts alone (those of models that see images) as one part, as in vLLM. The arguments of tool calls, which are
JSON in a string, are handed over as what they say, since templates write mappings; a template that can only join texts
gets the string. A call without arguments, or with null, has empty ones, as in vLLM.

Source: https://huggingface.co/docs/transformers/chat_extras (tool calls).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from megatron.errors import ConfigError
from megatron.tokenizers.chat_template import ChatTemplate, Message, TemplateRefusal

NO_VARIABLES = frozenset(
    (
        *("self", "conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs"),
    )
)
"""What `chat_template_kwargs` cannot set: what is said elsewhere, and arguments of apply_chat_template itself."""
_PROBES = ("probe-one", "probe-two")
_WRITTEN_PART = re.compile(r"""['"]type['"]\s*:\s*['"]text['"]""")
_BEFORE = {"assistant": 1, "tool": 2, "ipython": 2, "function": 2}
_CALL_ID = "123456789"  # some templates insist on nine characters


_LEARNT = ("weight", "loss", "train")
"""Fields of a turn that leave it out of the loss, as OpenAI's format, ms-swift and axolotl have them."""


def is_learnt(turn: Message) -> bool:
    """Returns whether a turn's own field lets it carry a loss: 1 or true, which is the default, or 0 or false.

    Raises ValueError for any other value.
    """
    given = {name: turn[name] for name in _LEARNT if turn.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"a turn's {name!r} is {value!r}, and can be 1 or true, or 0 or false for no loss")
    return all(given.values())


class InvalidToolCall(ValueError):
    """A tool call that cannot be read. number: of its message, from 0. what: what is wrong."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"turn {number + 1}: {what}")
        self.number, self.what = number, what


class Shapes:
    """Which shapes a template takes, found by rendering small conversations, and messages in those shapes."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._roles: dict[str, bool] = {}
        self._written: dict[str, bool | None] = {}

    def given(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages to be rendered; parts must be texts.

        Raises InvalidToolCall where the arguments of a tool call are a string that is no JSON.
        """
        return [self._given(number, message) for number, message in enumerate(messages)]

    def _given(self, number: int, message: Message) -> dict[str, Any]:
        made = dict(message)
        content = made.get("content")
        if isinstance(content, list) and not self.takes_parts(str(made.get("role"))):
            made["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self._takes_parts_alone(str(made.get("role"))):
            made["content"] = [{"type": "text", "text": content}]
        if made.get("tool_calls"):
            read = _keep_call if self.keeps_arguments else _read_call
            made["tool_calls"] = [read(number, call) for call in made["tool_calls"]]
        return made

    def takes_parts(self, role: str) -> bool:
        """Whether the template writes the texts of every part of a role's content, and not the parts themselves."""
        if role not in self._roles:
            text = self._turn(role, [{"type": "text", "text": probe} for probe in _PROBES]) or ""
            self._roles[role] = all(probe in text for probe in _PROBES) and not _WRITTEN_PART.search(text)
        return self._roles[role]

    def writes(self, role: str) -> bool | None:
        """Whether the template writes what a role says; None where it refuses a small conversation with the role."""
        return True if self._takes_parts_alone(role) else self._writes_text(role)

    def _takes_parts_alone(self, role: str) -> bool:
        return not self._writes_text(role) and self.takes_parts(role)

    def _writes_text(self, role: str) -> bool | None:
        """As `writes`, of a content that is a text."""
        if role not in self._written:
            text = self._turn(role, _PROBES[0])
            self._written[role] = None if text is None else _PROBES[0] in text
        return self._written[role]

    def _turn(self, role: str, content: object) -> str | None:
        """The text of a small conversation in which a role says that; None where the template refuses it."""
        turn = {"role": role, "content": content, "name": "probe", "tool_call_id": _CALL_ID}
        call = _call("{}" if self.keeps_arguments else {})
        before: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        after = [{"role": "user", "content": "a"}] if role in ("system", "developer") else []
        return self._text([*before[: _BEFORE.get(role, 0)], turn, *after])

    @cached_property
    def keeps_arguments(self) -> bool:
        """Whether the template writes arguments that are a string, and of a mapping makes no JSON."""
        mapping = {_PROBES[0]: _PROBES[1]}
        as_mapping, as_text = (
            [self._calling(how, words) for words in ("", None)] for how in (mapping, json.dumps(mapping))
        )
        taken = any(text is not None and f"{{'{_PROBES[0]}'" not in text for text in as_mapping)
        return not taken and any(json.dumps(mapping) in (text or "") for text in as_text)

    def _calling(self, arguments: object, content: str | None) -> str | None:
        asked = {"role": "user", "content": "a"}
        return self._text([asked, {"role": "assistant", "content": content, "tool_calls": [_call(arguments)]}])

    def _text(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._template.render(messages)
        except (TemplateRefusal, ConfigError):
            return None


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of mappings included, and what the parts of a content say together."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from texts_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts_of(each)
        parts = [part.get("text") for part in value if isinstance(part, Mapping)]
        if len(parts) > 1:
            yield "".join(part for part in parts if isinstance(part, str))


def _call(arguments: object) -> dict[str, Any]:
    return {"id": _CALL_ID, "type": "function", "function": {"name": "probe", "arguments": arguments}}


def _read_call(number: int, call: Any) -> Any:
    """A tool call whose arguments are what the JSON in them says."""
    function = _function_of(call)
    if function is None:
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments.strip() or "{}")
        except (ValueError, RecursionError) as error:
            raise InvalidToolCall(number, f"the arguments of {function.get('name')} are no JSON ({error})") from error
    return _with_arguments(call, {} if arguments is None else arguments)


def _keep_call(number: int, call: Any) -> Any:
    """A tool call for a template that joins the text of arguments."""
    function = _function_of(call)
    if function is None:
        return call
    arguments = function.get("arguments")
    nothing = arguments is None or (isinstance(arguments, str) and arguments.strip() == "null")
    return _with_arguments(call, "{}") if nothing else call


def _function_of(call: Any) -> Mapping[str, Any] | None:
    """What has the arguments of a call: its `function`, or the call itself; None for what is no call of a function."""
    if not isinstance(call, Mapping):
        return None
    inner = call.get("function")
    found = inner if isinstance(inner, Mapping) else call
    return found if "name" in found or "arguments" in found else None


def _with_arguments(call: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": {**inner, "arguments": arguments}}
    return {**call, "arguments": arguments}
