"""Conversations as tokens, by a model's chat template, with what one role wrote marked.

A template that says by the tag `generation` what the model writes decides that itself, for the role `assistant`. Of any
other, where a turn is in the rendered text is found by rendering the conversation turn by turn. A turn of the marked
role counts from behind the words with which the template opens it, as in generation, to its end: its calls of tools and
its reasoning too, and the special token that opens the next turn where nothing else ends this one (GLM-4). What a
template writes before an answer at the end of a conversation alone (Qwen3's empty reasoning) counts there alone.
Answers of tools belong to the tools. A token counts that holds any character of what counts, as in `transformers`:
behind a blank that opens the turn, the first word's token has that blank.

Source: https://huggingface.co/docs/transformers/chat_templating.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from megatron.errors import ConfigError
from megatron.tokenizers.chat_messages import NO_VARIABLES, Shapes, is_learnt, texts_of
from megatron.tokenizers.chat_spans import Rendering
from megatron.tokenizers.chat_template import REASONING, ChatTemplate, Message, TemplateRefusal
from megatron.tokenizers.pretrained import PretrainedFromHF

_KEY = "tokenizer_path"
_NO_REASONING = "<think></think>"


class ChatTokens:
    """The template and the tokenizer of a folder, or of a public model. Raises ConfigError when one cannot be had.

    parse_special: turns may spell special tokens, which become their ids. Where the folder says `split_special_tokens`
    they may anyway, and are text, those of the template too. eod: the model's end-of-text token.
    vocab_size: [tokens].
    """

    def __init__(self, folder: str, *, parse_special: bool = False) -> None:
        self._folder, self._parse_special = folder, parse_special
        try:
            self.tokenizer = PretrainedFromHF(folder)
        except ConfigError as error:
            raise ConfigError(*(replace(issue, key=_KEY) for issue in error.issues)) from error
        self.template = ChatTemplate.of_tokenizer(PretrainedFromHF.__name__, folder, key=_KEY)
        self.eod: int = self.tokenizer.eod
        self.vocab_size: int = self.tokenizer.vocab_size
        self.template.marks_generation()  # refuse a folder without a default template now
        self._shapes = Shapes(self.template)
        self._special = tuple(self.tokenizer.special_tokens)

    def encode(
        self,
        turns: Sequence[Message],
        *,
        role: str,
        only_last: bool,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and for each whether the role wrote it.

        Raises ValueError, with the reason, when the template refuses the turns, when it renders the words of earlier
        turns differently once later ones are there, when a turn or variable spells a special token, and for variables
        that cannot be set.

        Args:
            turns: Messages, whose contents are texts, parts that are texts, or nothing.
            role: The role whose turns are learnt.
            only_last: The last turn alone is marked, if the role wrote it.
            variables: `tools`, `documents` and others of the template.
        """
        given = self._given(turns)
        named = sorted(NO_VARIABLES.difference(("tools",)).intersection(variables))
        if named:
            raise ValueError(f"{named[0]!r} is no variable of the template that could be set")
        if not self._parse_special and not self.tokenizer.splits_special:
            self._check_spelling(given, variables)
        text, spans = Rendering(self.template, given, variables, self._special).marked(role, only_last)
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        return ids, [any(start < max(end, at + 1) and at < stop for start, stop in spans) for at, end in offsets]

    def learns_end(self, turns: Sequence[Message], variables: Mapping[str, Any]) -> bool:
        """Whether the end of text behind the turns is what the last of them ends with, and its field lets it be learnt.

        It is not where the template writes the header of a further answer behind every last turn.
        """
        if not is_learnt(turns[-1]):
            return False
        return not Rendering(self.template, self._given(turns), variables, self._special).header

    def left_out(self, turns: Sequence[Message], variables: Mapping[str, Any]) -> list[str]:
        """Which of `tools`, `documents`, `tool_calls` and turns are there, and are nothing in the rendered text."""
        given = self._given(turns)
        others = {
            name: (given, {key: value for key, value in variables.items() if key != name})
            for name in ("tools", "documents")
            if variables.get(name)
        }
        if any(turn.get("tool_calls") for turn in given):
            without = [{name: each for name, each in turn.items() if name != "tool_calls"} for turn in given]
            others["tool_calls"] = (without, dict(variables))
        unwritten = [turn for turn in given if self._shapes.writes(str(turn["role"])) is False]
        text = self.template.render(given, **variables) if others or unwritten else ""
        lost = [name for name, (messages, rest) in others.items() if self._renders(messages, rest) == text]
        roles = [turn["role"] for turn in unwritten if any(each.strip() not in text for each in _words_of(turn))]
        return lost + [f"turns of {role}" for role in dict.fromkeys(roles)]

    def unwritten(
        self, turns: Sequence[Message], variables: Mapping[str, Any], *, role: str, only_last: bool
    ) -> list[str]:
        """Which fields of the learnt turns hold words that are not in the rendered text: reasoning, or `content`.

        White space and empty reasoning may be written in another way, and text as in JSON. Turns of a role that the
        template does not write at all are not looked at (`left_out`).

        Args:
            turns: As for encode.
            variables: As for encode.
            role: As for encode.
            only_last: As for encode.
        """
        given = self._given(turns)
        learnt = [turn for turn in (given[-1:] if only_last else given) if turn["role"] == role and is_learnt(turn)]
        if not learnt or self._shapes.writes(role) is False:
            return []
        text = _compact(self.template.render(given, **variables))
        at, lost = 0, []
        for turn in learnt:
            ends = [at]
            for field, words in _fields_of(turn):
                forms = _compact(words), _compact(_as_json(words))
                found = [text.find(form, at) + len(form) for form in forms if text.find(form, at) >= 0]
                ends += found
                lost += [] if found else [field]
            at = max(ends)
        return list(dict.fromkeys(lost))

    def _given(self, turns: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages to be rendered; a developer is the system where the template knows no developer."""
        given = self._shapes.given(turns)
        if not any(turn["role"] == "developer" for turn in given) or self._shapes.writes("developer"):
            return given
        return [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in given]

    def _renders(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str | None:
        try:
            return self.template.render(messages, **variables)
        except TemplateRefusal:
            return None

    def _check_spelling(self, given: Sequence[Message], variables: Mapping[str, Any]) -> None:
        """Refuses special tokens in any text that the template is given, but for those that variables name as such."""
        fields = {name: value for name, value in variables.items() if not name.endswith("_token")}
        for what, value in (("a turn", list(given)), ("a field of the line", fields)):
            texts = "\0".join(texts_of(value))
            spelt = next((token for token in self._special if token in texts), None)
            if spelt is not None:
                raise ValueError(f"{what} spells the special token {spelt}")

    def __getstate__(self) -> tuple[str, bool]:
        return self._folder, self._parse_special

    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.__init__(state[0], parse_special=state[1])  # type: ignore[misc]


def _fields_of(turn: Message) -> list[tuple[str, str]]:
    """The names and texts of what a turn says: its reasoning, as a template is given it, and its content."""
    reasoning = next(((name, turn[name]) for name in REASONING if turn.get(name) is not None), None)
    found = [reasoning] if reasoning is not None and isinstance(reasoning[1], str) else []
    return found + [("content", text) for text in _words_of(turn)]


def _compact(text: str) -> str:
    """A text without white space and empty reasoning."""
    return "".join(text.split()).replace(_NO_REASONING, "")


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _words_of(turn: Message) -> list[str]:
    """The texts of a turn's content."""
    content = turn.get("content")
    found = [part.get("text") for part in content] if isinstance(content, list) else [content]
    return [text for text in found if isinstance(text, str)]
