"""Train a tokenizer on one's own text: byte-level BPE, or a sentencepiece model.

Byte-level BPE: every text has an encoding, and decoding gives it back unchanged. There is no normalisation and no space
put in front of a text, both of which would change the text that a model is measured on. Words are parted as GPT-2 does
(Radford et al. 2019), the special tokens are `<|endoftext|>` = 0 and `<|padding|>` = 1.

sentencepiece (unigram, arXiv:1804.10959, or its BPE): without normalisation, with a piece for every byte, and with runs
of spaces kept, so that it too gives every text back. `<|padding|>` = 0, `<unk>` = 1, `<s>` = 2, `<|endoftext|>` = 3.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.atomic import write_atomic
from megatron.errors import ConfigError, RunError
from megatron.tokenizers.base import END_OF_DOCUMENT

PADDING = "<|padding|>"
_BYTES = 256
# sentencepiece leaves out lines above a limit, and unigram takes time that grows with the square of the length of text
# that repeats inside long ones. No piece crosses a blank, so that lines parted there teach the same words. [bytes]
_LONGEST_LINE = 4096
_ENDS_A_LINE = re.compile("[\n\0\u2585]")  # sentencepiece ends a line at NUL, and leaves out lines with its own U+2585
_LINES_LEARNT = 2_000_000


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
            hint=f"ask for {least} or more",
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
    seen = _CountedTexts(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.characters:
        raise RunError.of("there is no text to learn a tokenizer from", hint="name files whose documents hold text")
    return tokenizer


class _CountedTexts:
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
    write_atomic(path, tokenizer.to_str(pretty=True).encode("utf-8"))


def train_sentence_piece(texts: Iterator[str], vocab_size: int, path: Path, *, algorithm: str = "unigram") -> int:
    """Writes a sentencepiece model of at most vocab_size pieces [tokens] learnt from the texts; returns their number.

    Raises ConfigError when the package is missing or the text does not support so many pieces, RunError when there is
    no text.

    Args:
        texts: The texts to learn from.
        vocab_size: Largest number of pieces [tokens].
        path: The .model file to write.
        algorithm: "unigram" or "bpe". Texts are learnt a line at a time; long lines are parted at blanks.
    """
    try:
        sentencepiece = importlib.import_module("sentencepiece")
    except ModuleNotFoundError as error:
        hint = "pip install neox[sentencepiece]"
        raise ConfigError.of("this needs the package sentencepiece", key="tokenizer_type", hint=hint) from error
    seen = _CountedTexts(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(seen),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=algorithm,
            hard_vocab_limit=algorithm != "unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=_LONGEST_LINE,
            input_sentence_size=_LINES_LEARNT,
            shuffle_input_sentence=True,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PADDING,
            eos_piece=END_OF_DOCUMENT,
            num_threads=1,  # several threads sum in any order, and so may learn another model
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if not seen.characters:
            hint = "name files whose documents hold text"
            raise RunError.of("there is no text to learn a tokenizer from", hint=hint) from error
        what, hint = _unlearnable(str(error).splitlines()[0])
        raise ConfigError.of(what, key="vocab_size", value=vocab_size, hint=hint) from error
    write_atomic(path, model.getvalue())
    learnt: int = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    return learnt


def _unlearnable(reported: str) -> tuple[str, str]:
    """What is wrong with a number of pieces, and the hint. reported: by the library."""
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reported):
        what = f"the bytes, marks and characters of this text alone are {found[1]} pieces"
        return what, f"ask for more than {found[1]}"
    what = f"sentencepiece cannot learn so many pieces from this text ({reported})"
    return what, "ask for fewer pieces, or give more text"


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in _ENDS_A_LINE.split(text):
            if line:
                yield from _parts(line)


def _parts(line: str) -> Iterator[str]:
    """The parts of a line that sentencepiece takes, each but the first from a blank on where there is one."""
    content = line.encode("utf-8") if len(line) > _LONGEST_LINE // 4 else b""
    if len(content) <= _LONGEST_LINE:
        yield line
        return
    at = 0
    while len(content) - at > _LONGEST_LINE:
        end = content.rfind(b" ", at + 1, at + _LONGEST_LINE + 1)
        if end < 0:
            end = at + _LONGEST_LINE
            while content[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
        yield content[at:end].decode("utf-8")
        at = end
    yield content[at:].decode("utf-8")
