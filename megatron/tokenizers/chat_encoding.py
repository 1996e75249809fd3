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
from itertools import compress
from types import MappingProxyType
from typing import Any

from megatron.errors import ConfigError
from megatron.tokenizers.chat_messages import NO_VARIABLES, Shapes, is_learnt, texts_of
from megatron.tokenizers.chat_template import REASONING, ChatTemplate, Message, TemplateRefusal
from megatron.tokenizers.pretrained import PretrainedFromHF

Spans = list[tuple[int, int]]
ASSISTANT = "assistant"
_KEY = "tokenizer_path"
_NO_REASONING = "<think></think>"
_OTHER_WORDS = "\ufdd3"  # no text begins with it
_WORDS = ("tool_calls", *REASONING)
"""What a role writes beside its content."""


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
        text, spans = _Rendering(self.template, given, variables, self._special).marked(role, only_last)
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        return ids, [any(start < max(end, at + 1) and at < stop for start, stop in spans) for at, end in offsets]

    def learns(self, turn: Message) -> bool:
        """Whether a turn's own field lets it carry a loss; ValueError where it says neither."""
        return is_learnt(turn)

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


class _Rendering:
    """One conversation, its template, the variables with which it is rendered and the special tokens."""

    def __init__(
        self, template: ChatTemplate, turns: Sequence[Message], variables: Mapping[str, Any], special: Sequence[str]
    ) -> None:
        self._template, self._turns, self._variables = template, turns, variables
        self._special = sorted(special, key=len, reverse=True)

    def marked(self, role: str, only_last: bool) -> tuple[str, Spans]:
        """The rendered text, and where the marked turns are in it [characters]."""
        turns = self._turns
        selected = [number for number, turn in enumerate(turns) if turn["role"] == role]
        if only_last:
            selected = [number for number in selected if number == len(turns) - 1]
        marks = self._template.marks_generation(self._variables.get("tools"))
        learnt = [is_learnt(turns[number]) for number in selected]
        if selected and marks and all(turns[number]["role"] == ASSISTANT for number in selected):
            text, spans = self._template.render_marked(turns, **self._variables)
            spans = spans[-1:] if only_last else spans
            if not all(learnt) and len(spans) != len(selected):
                raise ValueError("a turn is left out of the loss, and the template does not mark each turn once")
            return text, spans if all(learnt) else list(compress(spans, learnt))
        text = self._text(turns)
        return text, [self._ended(self._span(number, text), text) for number in compress(selected, learnt)]

    def _ended(self, span: tuple[int, int], text: str) -> tuple[int, int]:
        """The span with the special token that follows, where the turn has none at its end."""
        start, stop = span
        if text[start:stop].rstrip().endswith(tuple(self._special)):
            return span
        at = stop + len(text[stop:]) - len(text[stop:].lstrip())
        following = next((token for token in self._special if text.startswith(token, at)), None)
        return span if following is None else (start, at + len(following))

    def _text(self, turns: Sequence[Message], *, opens: bool = False) -> str:
        return self._template.render(turns, add_generation_prompt=opens, **self._variables)

    def _span(self, number: int, full_text: str) -> tuple[int, int]:
        """Where one turn is in the rendered text [characters]."""
        turns = self._turns
        closed = full_text if number == len(turns) - 1 else self._text(turns[: number + 1])
        differs = _common(closed, self._with_other_words(number, turns[: number + 1]))
        opened = differs
        if number and turns[number]["role"] == ASSISTANT:
            opened = self._prompted(turns[:number], closed, differs)
        # What is before the turn may have moved or changed, as where tools are described before the last question.
        moved = (
            0 if full_text.startswith(closed) else _common(full_text, self._with_other_words(number, turns)) - differs
        )
        first = min(opened, differs)
        if first + moved >= 0 and full_text.startswith(closed[first:], first + moved):
            return opened + moved, len(closed) + moved
        stop, inside = self._end_inside(number, closed, full_text, differs, moved), differs + moved
        if first + moved >= 0 and full_text[first + moved : inside] == closed[first:differs]:
            return opened + moved, stop
        # The template writes something else before the words when the turn is the last one (Qwen3).
        if number and turns[number]["role"] == ASSISTANT:
            return self._prompted(turns[:number], full_text, inside), stop
        return inside, stop

    def _end_inside(self, number: int, closed: str, full_text: str, differs: int, moved: int) -> int:
        """Where a turn ends that the template closes in another way when it is the last one (Phi-3, OLMo 3).

        Behind its words, and what follows them whether it is the last one or not. Raises ValueError where the words
        themselves are rendered in another way.
        """
        turns = self._turns
        tail = closed[len(closed) - _common_end(closed, self._with_other_words(number, turns[: number + 1])) :]
        following = full_text[len(full_text) - _common_end(full_text, self._with_other_words(number, turns)) :]
        stop = len(full_text) - len(following)
        if full_text[differs + moved : stop] != closed[differs : len(closed) - len(tail)]:
            raise ValueError("the template renders earlier turns differently once later ones are there")
        shared = _common(tail, following)
        inside = [at for text in (tail, following) for at in self._starts(text, shared)]
        return stop + min([shared, *inside])

    def _starts(self, text: str, at: int) -> list[int]:
        """Where special tokens begin that a position is inside of."""
        found = ((text.find(token, max(0, at - len(token) + 1), at + len(token) - 1)) for token in self._special)
        return [start for start in found if 0 <= start < at]

    def _with_other_words(self, number: int, turns: Sequence[Message]) -> str:
        """The text of the turns as if the role of one had written something else."""
        turn = turns[number]
        parts = isinstance(turn.get("content"), list)
        content = [{"type": "text", "text": _OTHER_WORDS}] if parts else _OTHER_WORDS
        other = {name: value for name, value in turn.items() if name not in _WORDS}
        try:
            return self._text([*turns[:number], {**other, "content": content}, *turns[number + 1 :]])
        except TemplateRefusal:  # answers of tools may insist on the call before them
            return self._text([*turns[:number], {**turn, "content": content}, *turns[number + 1 :]])

    def _prompted(self, before: Sequence[Message], closed: str, differs: int) -> int:
        """Where an answer to these turns begins: behind what a model is given to write it, if the text begins so.

        A template without a prompt for answers may open one by words, such as the name of the role, which are not the
        answer, or by blanks alone, which the model has to write.
        """
        try:
            prompt, plain = self._text(before, opens=True), self._text(before)
        except TemplateRefusal:
            return differs
        if not closed.startswith(prompt):
            return differs
        return len(prompt) if prompt != plain or closed[len(prompt) : differs].isspace() else differs


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


def _common_end(one: str, other: str) -> int:
    """How many characters both texts end with."""
    return _common(one[::-1], other[::-1])


def _common(one: str, other: str) -> int:
    """How many characters both texts begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))
