"""The tokenizer of an encoder-decoder: a text is its encoder's source, and what follows is the decoder's."""

from __future__ import annotations

from megatron.tokenizer_info import SpanTokens
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.vocab_limit import BoundedTokenizer, full_tokenizer, known_ids


class SourceTokenizer(BoundedTokenizer):
    """The tokenizer whose texts end as the encoder was trained on them, and whose answers end with the decoder's end.

    tokenizer: of the model. spans: its special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, spans: SpanTokens) -> None:
        super().__init__(full_tokenizer(tokenizer), known_ids(tokenizer))
        self._spans = spans

    @property
    def eod(self) -> int:
        """The token that ends an answer."""
        return self._spans.end

    @property
    def begin(self) -> int:
        """The token that an empty source consists of."""
        return self._spans.words.pad if self._spans.source_end is None else self._spans.source_end

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Nothing is before a source."""
        return ()

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The ids of a source, with `</s>` behind it where the vocabulary is T5's."""
        ids = super().encode_with_special_tokens(text)
        end = self._spans.source_end
        return ids if end is None or ids[-1:] == [end] else [*ids, end]


def reads_sources(tokenizer: Tokenizer) -> bool:
    """Returns whether the model's answer is another text than the one it reads, and not its continuation."""
    return isinstance(tokenizer, SourceTokenizer)
