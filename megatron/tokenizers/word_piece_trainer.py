"""Train a WordPiece vocabulary, the vocab.txt of BERT (arXiv:1810.04805), on one's own text.

The library numbers the first pieces in the order of a hash table, which changes from run to run, and pairs of equal
counts are merged by those numbers. So the characters are counted first, in a pass of their own, and given in order:
the same texts give the same vocabulary.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron.atomic import write_atomic
from megatron.errors import ConfigError, RunError
from megatron.tokenizers.bert import SPECIAL, UNKNOWN
from megatron.tokenizers.masking import CONTINUES


def train_word_pieces(
    texts: Callable[[], Iterator[str]], vocab_size: int, *, lower: bool, show_progress: bool = False
) -> list[str]:
    """Returns at most vocab_size pieces [tokens] in the order of their ids, the special tokens first.

    Raises ConfigError when vocab_size cannot hold the characters, RunError when there is no text.

    Args:
        texts: Returns the texts from the first one on; called twice.
        vocab_size: Largest number of pieces, the special ones included [tokens].
        lower: Lower-case the texts and take off accents.
        show_progress: Show the library's progress.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    characters = _characters(texts(), normalizer)
    if not characters:
        raise RunError.of("there is no text to learn a tokenizer from", hint="name files whose documents hold text")
    alphabet = [*characters, *(CONTINUES + each for each in characters if not _is_word(each, normalizer))]
    least = len(SPECIAL) + len(alphabet)
    if vocab_size < least:
        raise ConfigError.of(
            f"the {len(characters):,} characters of this text, at the start and inside of words, and {len(SPECIAL)} "
            f"special tokens are {least:,} pieces",
            key="vocab_size",
            value=vocab_size,
            hint=f"ask for {least} or more",
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *alphabet], show_progress=show_progress
    )
    tokenizer.train_from_iterator(texts(), trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def save_word_pieces(pieces: list[str], path: Path) -> None:
    """Writes vocab.txt, a piece a line, under its name only when complete."""
    write_atomic(path, "".join(f"{piece}\n" for piece in pieces).encode("utf-8"))


def _characters(texts: Iterator[str], normalizer: normalizers.Normalizer) -> list[str]:
    """Returns the characters of the texts as the normalizer leaves them, without white space, in order."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    return sorted({each for character in seen for each in normalizer.normalize_str(character) if not each.isspace()})


def _is_word(character: str, normalizer: normalizers.Normalizer) -> bool:
    """Returns whether a character is always a word of its own: punctuation, and those that get blanks around them."""
    marks = character.isascii() and not character.isalnum()
    return marks or unicodedata.category(character).startswith("P") or " " in normalizer.normalize_str(character)
