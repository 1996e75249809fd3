"""What a model reads of a text, and what text its answer is.

A prompt is read as `transformers` and lm-eval read it: special tokens that it spells are their ids, and before it
stands what the tokenizer itself puts there (LLaMA's `<s>`), unless the text spells that already, as chat templates do.
Nothing is put behind it, whatever the tokenizer would: a model goes on with the text.

Source: lm-eval 0.4.13, lm_eval/models/huggingface.py (tok_encode).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.tokenizers.base import Tokenizer

_UNKNOWN = "\ufffd"
"""What stands in a decoded text for bytes that are no character."""
_TAILS = (8, 9, 10, 11, 64)
"""Lengths of the end of a prompt that an answer is decoded behind [tokens]: a character has up to four bytes."""
_WINDOW = 128
"""How many tokens are decoded anew with each further one, before fewer are tried."""
_TAIL_LENGTHS = range(64, 68)
"""How many stay: one of these numbers begins with a whole character, which has up to four tokens."""
_EVERY = 17
"""After how many tokens it is tried; tokens end whole characters of up to four of them sooner or later."""


def read_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that a model reads of a text; none where the text is empty and the tokenizer puts nothing before it."""
    ids = tokenizer.encode_with_special_tokens(text)
    before = list(tokenizer.prefix_ids)
    begun = ids[:1] == [tokenizer.begin] or ids[: len(before)] == before
    return ids if begun else before + ids


def read_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """As `read_text`, at least one id: an empty text starts a document."""
    return read_text(tokenizer, text) or [tokenizer.begin]


class TextBehind:
    """The text of tokens that follow a prompt: that of both together without the prompt's own.

    Tokens alone may have another text: decoders of LLaMA's kind take the blank before the first word away. prompt: none
    of it to decode tokens alone.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tail, self._before = _tail(tokenizer, list(prompt))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of the tokens. It may end in U+FFFD, where a character is not whole yet."""
        full = self._tokenizer.decode([*self._tail, *tokens])
        if full.startswith(self._before):
            return full[len(self._before) :]
        shared = next(
            (at for at, pair in enumerate(zip(full, self._before, strict=False)) if pair[0] != pair[1]), len(full)
        )
        changed = self._before[shared:]
        bytes_before = len(changed.encode())
        if _UNKNOWN not in changed and full[shared : shared + bytes_before] == _UNKNOWN * bytes_before:
            return full[shared + bytes_before :]  # a decoder of bytes has made U+FFFD of whole characters before others
        return full[shared:]  # the prompt's last character was not whole


class GrowingText:
    """As `TextBehind`, for tokens that only become more: a further token costs the same however many there are."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._prompt = list(prompt[-_WINDOW:])
        self._behind = TextBehind(tokenizer, prompt)
        self._settled = ""
        self._passed = 0  # tokens whose text is settled

    def text(self, tokens: Sequence[int]) -> str:
        """The text of the tokens: those of the last call, and further ones."""
        window = tokens[self._passed :]
        text = self._behind.text(window)
        full = self._settled + text
        if len(window) >= _WINDOW and len(window) % _EVERY == 0 and not text.endswith(_UNKNOWN):
            self._settle(tokens, text)
        return full

    def _settle(self, tokens: Sequence[int], text: str) -> None:
        """Decodes only the last tokens from now on, if their text behind the others is what it is now."""
        for length in _TAIL_LENGTHS:
            passed = len(tokens) - length
            settled = self._behind.text(tokens[self._passed : passed])
            behind = TextBehind(self._tokenizer, [*self._prompt, *tokens[:passed]][-_WINDOW:])
            if not settled.endswith(_UNKNOWN) and settled + behind.text(tokens[passed:]) == text:
                self._settled += settled
                self._passed, self._behind = passed, behind
                return


def _tail(tokenizer: Tokenizer, prompt: list[int]) -> tuple[list[int], str]:
    """The end of a prompt, long enough to have whole characters, and its text."""
    for size in _TAILS:
        if size >= len(prompt):
            break
        text = tokenizer.decode(prompt[-size:])
        if text.strip() and _UNKNOWN not in text:
            return prompt[-size:], text
    return prompt, tokenizer.decode(prompt) if prompt else ""
