"""What a masked language model or span corruption needs of a tokenizer: special tokens, which pieces continue a word.

In a WordPiece vocabulary a piece with `##` in front continues a word (arXiv:1810.04805). In byte-level and
sentencepiece vocabularies a piece that starts with a blank starts a word, and the others continue one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron.errors import ConfigError
from megatron.tokenizer_info import ClassTokens, MaskingTokens, SpanTokens
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.vocab_limit import full_tokenizer

CONTINUES = "##"
BLANKS = ("\u0120", "\u2581", " ")
"""What stands for a blank in front of a piece: byte-level, sentencepiece, and as it is."""
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
}
"""Special token -> its spellings, those of BERT first."""

OF_SPANS: Mapping[str, tuple[str, ...]] = {
    "start": ("[BOS]", "<s>", "<pad>"),
    "end": ("[EOS]", "</s>"),
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
}
"""Token of span corruption -> its spellings, those of Megatron-LM's word pieces first, then T5's."""


def masking_tokens(tokenizer: Tokenizer) -> MaskingTokens:
    """Returns the tokens for masked samples. Raises ConfigError for a vocabulary that lacks one."""
    tokenizer = full_tokenizer(tokenizer)
    ids, pieces = _named(tokenizer, SPELLINGS), getattr(tokenizer, "pieces", None)
    missing = [" or ".join(texts) for name, texts in SPELLINGS.items() if name not in ids]
    if missing or pieces is None:
        lacks = ", ".join(missing) or "a list of its pieces"
        raise _lacking(f"train_impl: bert masks tokens of samples with separators, and the tokenizer lacks {lacks}")
    special = frozenset(tokenizer.special_tokens.values())
    return MaskingTokens(**ids, vocab_size=tokenizer.vocab_size, continues=continuing_pieces(pieces, special))


def class_tokens(tokenizer: Tokenizer) -> ClassTokens:
    """Returns the tokens for samples of a task. Raises ConfigError for a vocabulary that lacks one."""
    tokenizer = full_tokenizer(tokenizer)
    spellings = {name: texts for name, texts in SPELLINGS.items() if name != "mask"}
    ids = _named(tokenizer, spellings)
    missing = [" or ".join(texts) for name, texts in spellings.items() if name not in ids]
    if missing:
        raise _lacking(
            "train_impl: classification, ict and dpr put separators around texts, and the tokenizer lacks "
            + ", ".join(missing)
        )
    return ClassTokens(**ids, doubled=SPELLINGS["cls"][0] not in tokenizer.special_tokens)


def _named(tokenizer: Tokenizer, spellings: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Returns the ids of special tokens by their names; those that the vocabulary lacks are left out."""
    known = tokenizer.special_tokens
    return {
        name: known[spelt]
        for name, texts in spellings.items()
        if (spelt := next(filter(known.__contains__, texts), ""))
    }


def _lacking(what: str) -> ConfigError:
    return ConfigError.of(
        what,
        key="tokenizer_type",
        hint="use a vocabulary with these special tokens, such as that of BertWordPieceLowerCase; "
        "tools/train_tokenizer.py --tokenizer-type WordPiece learns one",
    )


def span_tokens(tokenizer: Tokenizer, needed: int) -> SpanTokens:
    """Returns the tokens for samples of span corruption. Raises ConfigError for a vocabulary that lacks some.

    needed: sentinels that a sample usually has.
    """
    tokenizer = full_tokenizer(tokenizer)
    special, pieces = tokenizer.special_tokens, getattr(tokenizer, "pieces", None)
    known = {piece: number for number, piece in enumerate(pieces or ())} | dict(special)
    sentinels = list[int]()
    while f"<extra_id_{len(sentinels)}>" in known:
        sentinels.append(known[f"<extra_id_{len(sentinels)}>"])
    found = {name: next((known[text] for text in texts if text in known), None) for name, texts in OF_SPANS.items()}
    missing = [" or ".join(OF_SPANS[name]) for name, number in found.items() if number is None]
    if len(sentinels) < needed:
        missing.append(f"{needed} sentinels, <extra_id_0> and on (it has {len(sentinels)})")
    if missing or pieces is None:
        raise ConfigError.of(
            "train_impl: t5 puts a sentinel in place of each span, and the tokenizer lacks "
            + (", ".join(missing) or "a list of its pieces"),
            key="tokenizer_type",
            hint="use a vocabulary with these tokens, such as T5's; tools/train_tokenizer.py --tokenizer-type WordPiece"
            " --extra-ids 100 learns one, and they can be appended to a vocab.txt, a line each",
        )
    ids = {name: number for name, number in found.items() if number is not None}
    absent = -1
    words = MaskingTokens(
        cls=known.get("[CLS]", absent),
        sep=known.get("[SEP]", absent),
        mask=absent,
        pad=ids["pad"],
        vocab_size=tokenizer.vocab_size,
        continues=continuing_pieces(pieces, frozenset(special.values()) | frozenset(sentinels)),
    )
    source_end = ids["end"] if ids["start"] == ids["pad"] else None  # T5 has no start token of its own
    return SpanTokens(words, ids["start"], ids["end"], tuple(sentinels), source_end)


def continuing_pieces(pieces: Sequence[str], special: frozenset[int]) -> bytes:
    """Returns a byte for each piece, 1 where it continues a word.

    Args:
        pieces: Text of each id in the vocabulary.
        special: Ids of special tokens, which are words of their own.
    """
    if any(piece.startswith(CONTINUES) and len(piece) > len(CONTINUES) for piece in pieces):
        return bytes(piece.startswith(CONTINUES) for piece in pieces)
    if any(piece.startswith(BLANKS) and len(piece) > 1 for piece in pieces):
        return bytes(
            not piece.startswith(BLANKS) and number not in special and piece[:1].isalnum()
            for number, piece in enumerate(pieces)
        )
    return bytes(len(pieces))
