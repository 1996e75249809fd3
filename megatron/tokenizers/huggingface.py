"""HFTokenizer: any tokenizer.json of the `tokenizers` library, such as the 20B tokenizer or one trained here.

The end of a document is the token `<|endoftext|>`; of a file without it, the end token that the tokenizer_config.json
beside it names.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.errors import ConfigError
from megatron.tokenizers.base import END_OF_DOCUMENT
from megatron.tokenizers.fast import FromTokenizers, parse, read_file
from megatron.tokenizers.tokenizer_config import CONFIG, read_beside

__all__ = ["END_OF_DOCUMENT", "HFTokenizer"]


class HFTokenizer(FromTokenizers):
    """A tokenizer.json.

    Raises ConfigError when the file is not given, missing, not a tokenizer, or it is not known what ends a document.
    """

    def __init__(self, vocab_file: str | None = None, merge_file: str | None = None) -> None:
        needs = "a tokenizer.json, such as one that tools/train_tokenizer.py writes"
        content = read_file(vocab_file, kind="HFTokenizer", key="vocab_file", needs=needs)
        beside = replace(read_beside(vocab_file), adds_begin=False)  # the file's post-processor says it
        tokenizer = parse(content, vocab_file)
        ends = (END_OF_DOCUMENT, beside.end)
        end = next((token for token in ends if token and tokenizer.token_to_id(token) is not None), None)
        if end is None:
            raise ConfigError.of(
                f"this tokenizer has no {END_OF_DOCUMENT}, which ends a document, and no {CONFIG} beside it names "
                "another of its tokens",
                key="vocab_file",
                value=vocab_file,
                hint=f"of a pretrained model, give its {CONFIG} too, or one with eos_token (a token that is added to "
                "the file makes the vocabulary grow); PretrainedFromHF also knows </s> and other usual ends",
            )
        super().__init__(tokenizer, end, vocab_file, beside)
