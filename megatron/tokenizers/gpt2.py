"""GPT2BPETokenizer: the two files of the GPT-2 release, a vocabulary and its merges.

vocab.json (also encoder.json) maps each token to its id; merges.txt (also vocab.bpe) has a merge a line, after a line
that names the version. Words are parted by GPT-2's pattern; `<|endoftext|>` ends a document.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from megatron.errors import ConfigError
from megatron.tokenizers.base import END_OF_DOCUMENT
from megatron.tokenizers.fast import FromTokenizers, read_file
from megatron.tokenizers.tokenizer_config import read_beside

KIND = "GPT2BPETokenizer"


class GPT2BPETokenizer(FromTokenizers):
    """GPT-2's tokenizer. Raises ConfigError when a file is missing or is none of the kind."""

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        vocabulary = read_file(vocab_file, kind=KIND, key="vocab_file", needs="a vocab.json")
        merges = read_file(merge_file, kind=KIND, key="merge_file", needs="a merges.txt")
        tokenizer = gpt2_bpe(vocabulary, merges, vocab_file, merge_file)
        super().__init__(tokenizer, END_OF_DOCUMENT, vocab_file, read_beside(vocab_file))


def gpt2_bpe(vocabulary: str, merges: str, vocab_file: str | None, merge_file: str | None) -> FastTokenizer:
    """A tokenizer of the text of both files. Raises ConfigError.

    Args:
        vocabulary: Content of vocab.json.
        merges: Content of merges.txt.
        vocab_file: Path of the first, for messages.
        merge_file: Path of the second, for messages.
    """
    try:
        tokens = json.loads(vocabulary)
        if not isinstance(tokens, dict) or not all(isinstance(number, int) for number in tokens.values()):
            raise ValueError("it does not map tokens to ids")
    except ValueError as error:
        what = f"this is not a vocab.json ({error})"
        raise ConfigError.of(what, key="vocab_file", value=vocab_file, hint="give GPT-2's vocab.json") from error
    try:
        pairs = [merge_of(line) for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
        tokenizer = FastTokenizer(models.BPE(tokens, pairs))
    except Exception as error:  # the library raises nothing narrower
        what = f"this is not a merges.txt of the vocabulary ({error})"
        raise ConfigError.of(what, key="merge_file", value=merge_file, hint="give GPT-2's merges.txt") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def merge_of(line: str) -> tuple[str, str]:
    """The two parts of a line of merges.txt. Raises ValueError."""
    parts = line.rstrip("\r").split(" ")
    if len(parts) != 2:
        raise ValueError(f"the line {line[:40]!r} is not two tokens")
    return parts[0], parts[1]
