"""Text to token ids and back."""

from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.builder import build_tokenizer, make_tokenizer

__all__ = ["Tokenizer", "build_tokenizer", "make_tokenizer"]
