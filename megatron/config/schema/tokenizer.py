"""The tokenizer and the size of the vocabulary."""

from megatron.config.field import Section, key
from megatron.registry import TOKENIZERS


class TokenizerSection(Section):
    """Tokenizer files and vocabulary padding."""

    tokenizer_type: str = key("GPT2BPETokenizer", "Kind of tokenizer.", choices=TOKENIZERS)
    vocab_file: str | None = key(
        None,
        "The tokenizer's file: tokenizer.json (HFTokenizer), vocab.json (GPT2BPETokenizer), .model (SPMTokenizer), "
        "vocab.txt (BertWordPiece...), .tiktoken or an encoding's name, a folder or a public model's name "
        "(HFGPT2Tokenizer, PretrainedFromHF).",
    )
    merge_file: str | None = key(None, "The merges.txt of GPT2BPETokenizer.")
    make_vocab_size_divisible_by: int = key(
        128, "The vocabulary is padded to a multiple of this times model_parallel_size.", unit="tokens"
    )
    vocab_size: int | None = key(
        None, "Tokens of the vocabulary before padding, where no tokenizer file has the number.", unit="tokens"
    )
    padded_vocab_size: int | None = key(None, "Rows of the embedding; follows from the tokenizer.", unit="tokens")
