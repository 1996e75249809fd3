"""Train a byte-level BPE tokenizer on one's own text.

Byte-level: every text has an encoding, and decoding gives it back unchanged. There is no normalisation and no space
put in front of a text, both of which would change the text that a model is measured on. Words are parted as GPT-2 does
(Radford et al. 2019), the special tokens are `<|endoftext|>` = 0 and `<|padding|>` = 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.errors import ConfigError, RunError
from megatron.tokenizers.huggingface import END_OF_DOCUMENT

PADDING = "<|padding|>"
_BYTES = 256


def train_byte_level_bpe(texts: Iterator[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """A tokenizer of at most vocab_size ids [tokens], the special ones included, learnt from the texts.

    The same texts in the same order give the same tokenizer. Raises ConfigError when vocab_size cannot hold the bytes,
    RunError when there is no text.
    """
    specials = [END_OF_DOCUMENT, PADDING]
    least = _BYTES + len(specials)
    if vocab_size < least:
        raise ConfigError.of(
            f"a byte-level vocabulary has at least {least} ids, {_BYTES} bytes and {len(specials)} special tokens",
            key="vocab_size",
            value=vocab_size,
            remedy=f"ask for {least} or more",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    seen = _Seen(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.characters:
        raise RunError.of("there is no text to learn a tokenizer from", remedy="name files whose documents hold text")
    return tokenizer


class _Seen:
    """Hands texts on and counts their characters."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield text


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes tokenizer.json, under its name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
