"""What a masked language model needs of a tokenizer: its special tokens, and which pieces continue a word.

In a WordPiece vocabulary a piece with `##` in front continues a word (arXiv:1810.04805). In byte-level and
sentencepiece vocabularies a piece that starts with a blank starts a word, and the others continue one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron.errors import ConfigError
from megatron.tokenizer_info import MaskingTokens
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


def masking_tokens(tokenizer: Tokenizer) -> MaskingTokens:
    """Returns the tokens for masked samples. Raises ConfigError for a vocabulary that lacks one."""
    tokenizer = full_tokenizer(tokenizer)
    named = {
        name: next((tokenizer.special_tokens[text] for text in texts if text in tokenizer.special_tokens), None)
        for name, texts in SPELLINGS.items()
    }
    missing = [" or ".join(SPELLINGS[name]) for name, number in named.items() if number is None]
    pieces = getattr(tokenizer, "pieces", None)
    if missing or pieces is None:
        lacks = ", ".join(missing) or "a list of its pieces"
        raise ConfigError.of(
            f"train_impl: bert masks tokens of samples with separators, and the tokenizer lacks {lacks}",
            key="tokenizer_type",
            hint="use a vocabulary with these special tokens, such as that of BertWordPieceLowerCase; "
            "tools/train_tokenizer.py --tokenizer-type WordPiece learns one",
        )
    ids = {name: number for name, number in named.items() if number is not None}
    special = frozenset(tokenizer.special_tokens.values())
    return MaskingTokens(**ids, vocab_size=tokenizer.vocab_size, continues=continuing_pieces(pieces, special))


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
