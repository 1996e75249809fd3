"""HFTokenizer: any tokenizer.json of the `tokenizers` library, such as the 20B tokenizer or one trained here.

The end of a document is the token `<|endoftext|>`.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.tokenizers.base import END_OF_DOCUMENT
from megatron.tokenizers.beside import read_beside
from megatron.tokenizers.fast import FromTokenizers, parse, read_file

__all__ = ["END_OF_DOCUMENT", "HFTokenizer"]


class HFTokenizer(FromTokenizers):
    """A tokenizer.json.

    Raises ConfigError when the file is not given, missing, not a tokenizer, or has no `<|endoftext|>`.
    """

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        needs = "a tokenizer.json, such as one that tools/train_tokenizer.py writes"
        content = read_file(vocab_file, kind="HFTokenizer", key="vocab_file", needs=needs)
        beside = replace(read_beside(vocab_file), adds_begin=False)  # the file's post-processor says it
        super().__init__(parse(content, vocab_file), END_OF_DOCUMENT, vocab_file, beside)
