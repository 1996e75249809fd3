"""The conversation of a JSON line: its turns, and what the line says beside them for the chat template.

A turn is a message as `transformers` takes it: `role`, `content` (a text, or a list of parts that are texts; it may be
missing or null beside `tool_calls` or reasoning), and whatever else the template reads. Beside the turns a line may
have `tools`, `documents` and `chat_template_kwargs`, as in TRL.

Sources: https://huggingface.co/docs/transformers/chat_templating; https://huggingface.co/docs/trl/dataset_formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron.data.preprocess.encode import InvalidDocument, text_of

TOOLS, DOCUMENTS, KWARGS = "tools", "documents", "chat_template_kwargs"
NO_TEXT = "with a part of a content that is no text"
_NO_CALLS = "whose 'tool_calls' are no list of calls"
_HALF = "that holds half a surrogate pair"
_INSTEAD = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""What a turn without a content may say in its place."""


def turns_of(record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The turns of a conversation, as they are. Raises InvalidDocument."""
    if key not in record:
        raise InvalidDocument(
            f"without the key {key!r}", f"its keys: {', '.join(sorted(map(repr, record))[:8]) or 'none'}"
        )
    turns = record[key]
    if not isinstance(turns, list):
        raise InvalidDocument(f"whose {key!r} is no list of turns", f"it is {type(turns).__name__}")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise InvalidDocument(f"whose {key!r} is no list of turns", f"turn {number} is {type(turn).__name__}")
        text_of(turn, "role")
        _check_content(number, turn)
        _check_calls(number, turn.get("tool_calls"))
        _check_encodable(turn)
    return turns


def variables_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is given beside the turns. `tools` may be JSON in a string. Raises InvalidDocument."""
    own = record.get(KWARGS)
    if own is not None and not isinstance(own, dict):
        raise InvalidDocument(f"whose {KWARGS!r} is no object", f"it is {own!r}"[:80])
    found = {TOOLS: _tools(record.get(TOOLS)), DOCUMENTS: record.get(DOCUMENTS)}
    found = {name: value for name, value in found.items() if value is not None}
    twice = sorted({TOOLS, *found}.intersection(own or ()))
    if twice:
        raise InvalidDocument(f"whose {KWARGS!r} set what is a field of the line", repr(twice[0]))
    made = {**found, **(own or {})}
    for name in (TOOLS, DOCUMENTS):
        value = made.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
            raise InvalidDocument(f"whose {name!r} is no list of objects", f"it is {value!r}"[:80])
    _check_encodable(made)
    return made


def text_bytes_of(turns: list[dict[str, Any]]) -> int:
    """How much text the turns hold [bytes]: contents, and the calls of tools as JSON."""
    size = 0
    for turn in turns:
        content, calls = turn.get("content") or "", turn.get("tool_calls")
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        size += sum(len(text.encode()) for text in texts)
        size += len(json.dumps(calls, ensure_ascii=False).encode()) if calls else 0
    return size


def _tools(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidDocument(f"whose {TOOLS!r} is a text that is no JSON", str(error)) from error


def _check_content(number: int, turn: Mapping[str, Any]) -> None:
    content = turn.get("content")
    if content is None and any(turn.get(name) for name in _INSTEAD):
        return
    if not isinstance(content, list):
        text_of(turn, "content")
        return
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            found = f"of the type {kind!r}" if kind not in (None, "text") else f"{part!r}"[:60]
            raise InvalidDocument(NO_TEXT, f"turn {number} has a part {found}; texts alone can be learnt")


def _check_calls(number: int, calls: Any) -> None:
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InvalidDocument(_NO_CALLS, f"turn {number} has {calls!r}"[:80])


def _check_encodable(value: Any) -> None:
    """Refuses single surrogates, which JSON may spell and UTF-8 has no form for."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidDocument(_HALF) from error
