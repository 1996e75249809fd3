r"""Tokens as clients see them: the text of one, its bytes, and where in a text each begins.

The text of a token is what it adds to a text that goes before it, so that it keeps its blank; a special token is its
spelling. What is only a part of a character is spelt `bytes:\xe2`, as OpenAI does; an id without any text is
`token_id:ID`, as vLLM writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.inference.prompt_encoding import TextBehind
from megatron.tokenizers.base import Tokenizer

_WINDOW = 16
"""Tokens that are decoded together to find the place of the next one [tokens]."""
_BEFORE = 128
"""Most tokens before them that their text may depend on [tokens]."""


class Words:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special = {number: text for text, number in tokenizer.special_tokens.items()}
        self._behind = TextBehind(tokenizer, tokenizer.encode("a"))
        self._known: dict[int, tuple[str, list[int]]] = {}

    def text(self, token: int) -> str:
        """The text of a token; see above."""
        return self._looked_up(token)[0]

    def bytes_of(self, token: int) -> list[int]:
        """The bytes of a token's text, 0 to 255; none of an id without text."""
        return self._looked_up(token)[1]

    def spelt(self, tokens: Sequence[int]) -> str:
        """A whole text, special tokens included."""
        pieces: list[str] = []
        start = 0
        for at, token in enumerate([*tokens, None]):
            if token is None or token in self.special:
                pieces.append(TextBehind(self._tokenizer, tokens[:start][-_BEFORE:]).text(tokens[start:at]))
                pieces.append("" if token is None else self.special[token])
                start = at + 1
        return "".join(pieces)

    def offsets(self, before: Sequence[int] = ()) -> TokenOffsets:
        """Where the tokens that follow others begin in their own text, which has no special tokens."""
        return TokenOffsets(self._tokenizer, before)

    def offsets_in(self, text: str, tokens: Sequence[int]) -> list[int]:
        """Where in a prompt's text each of its tokens begins. One that the text does not spell takes no room."""
        found: list[int] = []
        at, start = 0, 0  # where the stretch of ordinary tokens begins: in the text, and among the tokens
        for number, token in enumerate(tokens):
            special = self.special.get(token)
            if special is None:
                if start == number:
                    offsets = self.offsets(tokens[:number])
                    base = at
                found.append(min(len(text), base + offsets.add(token)))
                at = min(len(text), base + offsets.end)
            else:
                found.append(at)
                at += len(special) if text.startswith(special, at) else 0
                start = number + 1
        return found

    def _looked_up(self, token: int) -> tuple[str, list[int]]:
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def _spell(self, token: int) -> tuple[str, list[int]]:
        text = self.special.get(token) or self._behind.text([token])
        if not text:
            return f"token_id:{token}", []
        if "\ufffd" not in text:
            return text, list(text.encode())
        spelt = self._tokenizer.bytes_of(token)
        if spelt is None or spelt == text.encode():
            return text, list(text.encode())
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt), list(spelt)


class TokenOffsets:
    """Where each of a row of tokens begins in their text [characters], one after another.

    A part of a character begins where the character does.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._before = list(before[-_BEFORE:])
        self._behind = TextBehind(tokenizer, self._before)
        self._passed = 0  # the text of tokens that are not decoded any more
        self.end = 0

    def add(self, token: int) -> int:
        """Where the next token begins; `end` is then where the one after it does."""
        offset = self.end
        self._tokens.append(token)
        text = self._behind.text(self._tokens)
        # Where bytes spell characters, decoders give a whole run of them up while its last character is not whole.
        self.end = max(self.end, self._passed + len(text.rstrip("\ufffd")))
        if len(self._tokens) >= _WINDOW and not text.endswith("\ufffd"):
            self._before = [*self._before, *self._tokens][-_BEFORE:]
            self._behind, self._tokens, self._passed = TextBehind(self._tokenizer, self._before), [], self.end
        return offset
