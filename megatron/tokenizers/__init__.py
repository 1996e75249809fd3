"""Text to token ids and back."""

from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.build import build_tokenizer, make_tokenizer
from megatron.tokenizers.padding import padded_vocab_size

__all__ = ["Tokenizer", "build_tokenizer", "make_tokenizer", "padded_vocab_size"]
