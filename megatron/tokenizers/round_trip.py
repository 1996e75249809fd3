"""What decoding does not give back of a text, in words: what the tokenizer's file normalises, drops or cannot spell.

And whether LLaMA's class, which a tokenizer_config.json names, leaves out what a sentencepiece model would normalise.
"""

from __future__ import annotations

from megatron.log import get_logger
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


def notes(tokenizer: Tokenizer) -> list[str]:
    """Lines for the user about texts that lose something or are read in an unexpected way; none for most tokenizers."""
    lost = losses(tokenizer)
    line = f"this tokenizer does not keep every text: {', '.join(lost)} do not come back as they were"
    return [*([line] if lost else ()), *reading_notes(tokenizer)]


def warn_of(tokenizer: Tokenizer) -> None:
    """Logs the notes, for figures that assume that the tokens of a text hold all of it."""
    for line in notes(tokenizer):
        get_logger(__name__).warning("%s", line)


def reading_notes(tokenizer: Tokenizer) -> list[str]:
    """A line where LLaMA's class reads other ids than sentencepiece would."""
    normalised = _left_out(tokenizer)
    line = (
        "tokenizer_config.json names LLaMA's class, under which transformers leaves out what this .model does to "
        f"{', '.join(normalised)}: data, prompts and exports are read so too, and not as sentencepiece would; "
        "without tokenizer_class there all are read as sentencepiece would"
    )
    return [line] if normalised else []


def _left_out(tokenizer: Tokenizer) -> list[str]:
    """The kinds of characters that a .model normalises and LLaMA's class beside it does not."""
    own = getattr(tokenizer, "own_ids", None)
    if own is None or getattr(tokenizer, "blank", None) is None:
        return []
    inside = {kind: [f"a{text}b" for text in texts] for kind, texts in _KINDS.items()}
    return [kind for kind, texts in inside.items() if any(own(text) != tokenizer.encode(text) for text in texts)]


def _survives(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.decode(tokenizer.encode(text)) == text
