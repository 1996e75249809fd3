"""Build the tokenizer that a configuration or a command line names."""

from __future__ import annotations

from typing import Protocol

from megatron.registry import TOKENIZERS
from megatron.tokenizers.base import Tokenizer


class TokenizerChoice(Protocol):
    """The keys that choose a tokenizer; the configuration's tokenizer section has them."""

    @property
    def tokenizer_type(self) -> str: ...

    @property
    def vocab_file(self) -> str | None: ...

    @property
    def merge_file(self) -> str | None: ...


def make_tokenizer(kind: str, *, vocab_file: str | None = None, merge_file: str | None = None) -> Tokenizer:
    """The tokenizer of a registered kind.

    Raises ConfigError when the kind is not known, or a file that it needs is not given, missing or unusable.
    """
    tokenizer: Tokenizer = TOKENIZERS.load(kind)(vocab_file=vocab_file, merge_file=merge_file)
    return tokenizer


def build_tokenizer(section: TokenizerChoice) -> Tokenizer:
    """The tokenizer of a configuration's tokenizer section; raises as `make_tokenizer` does."""
    return make_tokenizer(section.tokenizer_type, vocab_file=section.vocab_file, merge_file=section.merge_file)
