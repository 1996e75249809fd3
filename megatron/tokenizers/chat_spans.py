"""Where the turns of one role are in the rendered text of a conversation, by rendering it turn by turn.

Some templates end every conversation with the header of a further answer, asked for or not (Llama 3 Instruct as first
released, Command R7B with tools). The header behind the last turn belongs to no turn; the one before an answer is what
a model is given to write it.

Source: https://huggingface.co/docs/transformers/chat_templating.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import compress, pairwise
from typing import Any

from megatron.tokenizers.chat_messages import is_learnt
from megatron.tokenizers.chat_template import REASONING, ChatTemplate, Message, TemplateRefusal

Spans = list[tuple[int, int]]
ASSISTANT = "assistant"
_OTHER_WORDS = "\ufdd3"  # no text begins with it
_QUESTION: Message = {"role": "user", "content": "\ufdd4"}
_WORDS = ("tool_calls", *REASONING)
"""What a role writes beside its content."""


class Rendering:
    """One conversation as a template renders it.

    Args:
        template: The chat template.
        turns: The messages, in the shapes that the template takes.
        variables: Further variables of the template.
        special: The special tokens of the tokenizer.
    """

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
        text = self._text(turns) if selected else ""
        spans = [self._ended(*self._span(number, text), text) for number in compress(selected, learnt)]
        return self._rendered(turns), spans

    @cached_property
    def header(self) -> str:
        """The header of a further answer that the template writes behind every last turn; empty where it writes none.

        An answer and the same with a question behind it go on alike for the end of the answer, and for what opens any
        turn. The header begins with what opens turns, which is in the text before the tokens that end them.
        """
        try:
            number = self._first_answer()
            turns = [*self._turns[:number], *self._turns[number:][:1]]
            if number == len(turns):
                turns += [*([_QUESTION] if turns[-1]["role"] == ASSISTANT else []), {"role": ASSISTANT, "content": ""}]
            number = len(turns) - 1
            before = self._rendered(turns[:number])
            if before != self._rendered(turns[:number], opens=True):
                return ""
            closed = self._with_other_words(number, turns, self._rendered)
            followed = self._with_other_words(number, [*turns, _QUESTION], self._rendered)
        except TemplateRefusal:
            return ""
        shared = _common(closed, followed)
        shared = min([shared, *self._starts(closed, shared)])
        rest = closed[shared:]
        if not rest or not closed.startswith(before) or not before.endswith(rest):
            return ""
        alike = min(_common_end(closed[:shared], before.removesuffix(rest)), shared - len(before))
        return closed[shared - alike + self._end_of_turn(closed[shared - alike : shared], before) :]

    def _first_answer(self) -> int:
        """The number of the first answer to something, or how many turns there are."""
        roles = [turn["role"] for turn in self._turns]
        return next((number for number, role in enumerate(roles) if number and role == ASSISTANT), len(roles))

    def _end_of_turn(self, text: str, before: str) -> int:
        """Where a turn ends in what follows its words up to what differs between roles [characters]."""
        found = list(self._tokens(text))
        if not found:
            return text.rfind("\n") + 1 or len(text)
        for (_, first), (start, last) in pairwise(found[-2:]):
            if before.find(last) < before.find(first):
                return start
        start, last = found[-1]
        behind = text[start + len(last) :]
        return len(text) - len(behind.lstrip())

    def _tokens(self, text: str) -> Iterator[tuple[int, str]]:
        """The special tokens of a text, and where each begins."""
        at = 0
        while at < len(text):
            token = next((token for token in self._special if text.startswith(token, at)), None)
            if token is not None:
                yield at, token
            at += len(token or " ")

    def _ended(self, start: int, stop: int, inside: int, text: str) -> tuple[int, int]:
        """The span with the special token that follows, where the turn has none behind where its words begin."""
        own = text[start:stop].rstrip()
        if start + len(own) > inside and own.endswith(tuple(self._special)):
            return start, stop
        at = stop + len(text[stop:]) - len(text[stop:].lstrip())
        following = next((token for token in self._special if text.startswith(token, at)), None)
        return start, stop if following is None else at + len(following)

    def _text(self, turns: Sequence[Message], *, opens: bool = False) -> str:
        """The text of turns, with the header of an answer where that is asked for alone."""
        text = self._rendered(turns, opens=opens)
        return text if opens else text.removesuffix(self.header)

    def _rendered(self, turns: Sequence[Message], *, opens: bool = False) -> str:
        return self._template.render(turns, add_generation_prompt=opens, **self._variables)

    def _span(self, number: int, full_text: str) -> tuple[int, int, int]:
        """Where one turn is in the rendered text, and where its words begin [characters]."""
        turns = self._turns
        try:
            closed = full_text if number == len(turns) - 1 else self._text(turns[: number + 1])
        except TemplateRefusal:
            return self._among_later_turns(number, full_text)
        other = self._with_other_words(number, turns[: number + 1])
        differs = _common(closed, other)
        if differs == len(closed) < len(full_text) and number and closed == self._text(turns[:number]):
            return self._unwritten_when_last(number, other, full_text)
        opened = differs
        if number and turns[number]["role"] == ASSISTANT:
            opened = self._prompted(turns[:number], closed, differs)
        # What is before the turn may have moved or changed, as where tools are described before the last question.
        moved = (
            0 if full_text.startswith(closed) else _common(full_text, self._with_other_words(number, turns)) - differs
        )
        first, inside = min(opened, differs), differs + moved
        if first + moved >= 0 and full_text.startswith(closed[first:], first + moved):
            return opened + moved, len(closed) + moved, inside
        stop = self._end_inside(number, closed, full_text, differs, moved)
        if first + moved >= 0 and full_text[first + moved : inside] == closed[first:differs]:
            return opened + moved, stop, inside
        # The template writes something else before the words when the turn is the last one (Qwen3).
        if number and turns[number]["role"] == ASSISTANT:
            return self._prompted(turns[:number], full_text, inside), stop, inside
        return inside, stop, inside

    def _among_later_turns(self, number: int, full_text: str) -> tuple[int, int, int]:
        """Where a turn is that the template renders with later turns alone (Qwen3.5: with a question).

        Its words, the special token that follows them, and blanks up to the one of the next turn.
        """
        other = self._with_other_words(number, self._turns)
        inside = _common(full_text, other)
        stop = len(full_text) - _common_end(full_text[inside:], other)
        _, ended = self._ended(inside, stop, inside, full_text)
        following = ended + len(full_text[ended:]) - len(full_text[ended:].lstrip())
        return inside, following if full_text.startswith(tuple(self._special), following) else ended, inside

    def _unwritten_when_last(self, number: int, other: str, full_text: str) -> tuple[int, int, int]:
        """Where an empty turn is that the template does not write when it is the last one (Nemotron Nano 2)."""
        other_text = self._with_other_words(number, self._turns)
        inside = _common(full_text, other_text)
        following = full_text[len(full_text) - _common_end(full_text, other_text) :]
        shared = _common(other.partition(_OTHER_WORDS)[2], following)
        return inside, inside + min([shared, *self._starts(following, shared)]), inside

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

    def _with_other_words(
        self, number: int, turns: Sequence[Message], render: Callable[[Sequence[Message]], str] | None = None
    ) -> str:
        """The text of the turns as if the role of one had written something else."""
        turn, render = turns[number], render or self._text
        parts = isinstance(turn.get("content"), list)
        content = [{"type": "text", "text": _OTHER_WORDS}] if parts else _OTHER_WORDS
        other = {name: value for name, value in turn.items() if name not in _WORDS}
        try:
            return render([*turns[:number], {**other, "content": content}, *turns[number + 1 :]])
        except TemplateRefusal:  # answers of tools may insist on the call before them
            return render([*turns[:number], {**turn, "content": content}, *turns[number + 1 :]])

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


def _common_end(one: str, other: str) -> int:
    """How many characters both texts end with."""
    return _common(one[::-1], other[::-1])


def _common(one: str, other: str) -> int:
    """How many characters both texts begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))
