"""What decoding does not give back of a text, in words: what the tokenizer's file normalises, drops or cannot spell."""

from __future__ import annotations

from megatron.tokenizers.base import Tokenizer

_KINDS = {
    "line ends": ("a\nb", "a\n\nb", "a\r\nb"),
    "tabs": ("a\tb",),
    "repeated blanks": ("a  b", "a    b"),
    "outer blanks": (" a", "a "),
    "capitals": ("A b", "aB"),
    "accents": ("\u00e9",),
    "decomposed accents": ("e\u0301",),
    "ligatures and wide forms": ("\ufb01", "\uff21"),
    "characters of other scripts": ("\u0436", "\u6771", "\u0645"),
    "emoji": ("\U0001f642",),
}


def losses(tokenizer: Tokenizer) -> list[str]:
    """The kinds of characters that some text loses; none for a tokenizer that keeps every text."""
    if tokenizer.lossless:
        return []
    lost = [kind for kind, texts in _KINDS.items() if any(not _survives(tokenizer, text) for text in texts)]
    return lost or ["some characters"]


def _survives(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.decode(tokenizer.encode(text)) == text
