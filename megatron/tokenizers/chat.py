"""Conversations as tokens, by a model's chat template, with what one role wrote marked.

A template that says by the tag `generation` what the model writes decides that itself, for the role `assistant`. Of any
other, where a turn lies in the rendered text is found by rendering the conversation turn by turn. A turn of the marked
role counts from behind the words with which the template opens it, as in generation, to its end.

Source: https://huggingface.co/docs/transformers/chat_templating.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron.errors import ConfigError
from megatron.tokenizers.chat_template import ChatTemplate, TemplateRefusal
from megatron.tokenizers.pretrained import PretrainedFromHF

Spans = list[tuple[int, int]]
ASSISTANT = "assistant"
_KEY = "tokenizer_path"
_OTHER_WORDS = "\ufdd3"  # no text begins with it


class ChatTokens:
    """The template and the tokenizer of a folder, or of a public model. Raises ConfigError when one cannot be had.

    parse_special: turns may spell special tokens, which become their ids. eod: the model's end-of-text token.
    vocab_size: [tokens].
    """

    def __init__(self, folder: str, *, parse_special: bool = False) -> None:
        self._folder, self._parse_special = folder, parse_special
        try:
            self.tokenizer = PretrainedFromHF(folder)
        except ConfigError as fault:
            raise ConfigError(*(replace(mistake, key=_KEY) for mistake in fault.mistakes)) from fault
        self.template = ChatTemplate.of_tokenizer(PretrainedFromHF.__name__, folder, key=_KEY)
        self.eod: int = self.tokenizer.eod
        self.vocab_size: int = self.tokenizer.vocab_size
        self._marks = self.template.marks_generation
        self._special = tuple(self.tokenizer.special_tokens)

    def encode(self, turns: Sequence[Mapping[str, str]], *, role: str, only_last: bool) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and for each whether the role wrote it.

        only_last: the last turn alone is marked, whoever wrote it. Raises ValueError, with the reason, when the
        template refuses the turns, when it renders earlier turns differently once later ones are there, and when a turn
        spells a special token.
        """
        for turn in () if self._parse_special else turns:
            spelt = next((token for token in self._special if token in turn["content"]), None)
            if spelt is not None:
                raise ValueError(f"a turn spells the special token {spelt}")
        text, spans = self._marked(turns, role, only_last)
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        return ids, [any(start <= at < stop for start, stop in spans) for at, _ in offsets]

    def _marked(
        self, turns: Sequence[Mapping[str, str]], role: str, only_last: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and where the marked turns lie in it [characters]."""
        wanted = [number for number, turn in enumerate(turns) if turn["role"] == role]
        if only_last:
            wanted = [len(turns) - 1]
        if wanted and self._marks and all(turns[number]["role"] == ASSISTANT for number in wanted):
            text, spans = self.template.render_marked(turns)
            return text, spans[-1:] if only_last else spans
        text = self.template.render(turns)
        return text, [self._span(turns, number, text) for number in wanted]

    def _span(self, turns: Sequence[Mapping[str, str]], number: int, whole: str) -> tuple[int, int]:
        """Where one turn lies in the rendered text [characters]."""
        closed = whole if number == len(turns) - 1 else self.template.render(turns[: number + 1])
        if not whole.startswith(closed):
            raise ValueError("the template renders earlier turns differently once later ones are there")
        other = self.template.render([*turns[:number], {**turns[number], "content": _OTHER_WORDS}])
        opened = _common(closed, other)
        if number and turns[number]["role"] == ASSISTANT:
            opened = self._prompted(turns[:number], closed) or opened
        return opened, len(closed)

    def _prompted(self, before: Sequence[Mapping[str, str]], closed: str) -> int:
        """The length of what a model is given to answer these turns; 0 where the text goes on with something else."""
        try:
            prompt = self.template.render(before, add_generation_prompt=True)
            plain = self.template.render(before)
        except TemplateRefusal:
            return 0
        return len(prompt) if prompt != plain and closed.startswith(prompt) else 0

    def __getstate__(self) -> tuple[str, bool]:
        return self._folder, self._parse_special

    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.__init__(state[0], parse_special=state[1])  # type: ignore[misc]


def _common(one: str, other: str) -> int:
    """How many characters both texts begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))
