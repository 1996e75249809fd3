"""Folders of small LLaMA models with every kind of tokenizer files, as releases and model authors write them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.tokenizers.sentence_piece import SPMTokenizer
from megatron.tokenizers.sentence_piece_json import as_tokenizer_json

TEXT = [
    *["the quick brown fox jumps over the lazy dog. it was a dark and stormy night, and the rain fell in torrents."]
    * 5,
    *["Hello world, this is a small test of numbers 0 1 2 3 4 5 6 7 8 9.", "def read(n):\n    return data[:n]\n"] * 20,
]
SAMPLES = [
    "the quick brown fox",
    "Hello world, 42  blanks",
    "def read(n):\n\n    return x\n",
    "na\u00efve \u4f60\u597d \U0001f642",
]
READ = [
    *("", " ", "  ", "the quick", " the quick", "  the quick", "   a", "the  fox   ", "\n", "\nthe fox\n", "a\tb"),
    *("</s>the", " </s> the", "</s>  the </s>the", "<s>the<s> fox", "</s>", "<s></s>", "\u2581x", " \u2581 x"),
    *(
        "na\u00efve \u4f60\u597d \U0001f642",
        "\u041f\u0440\u0438\u0432\u0435\u0442",
        " \u0645\u0631\u062d\u0628\u0627",
        "\uff21\u00a0e\u0301",
    ),
]
"""Texts that begin with blanks, are behind special tokens, are empty, or of several scripts."""
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def write_model(folder: Path, vocabulary: int, **ids: Any) -> None:
    """A model with that many rows."""
    torch.manual_seed(0)
    reported = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **reported, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def byte_level(special: list[str]) -> FastTokenizer:
    """GPT-2's kind, with special tokens behind the vocabulary."""
    made = FastTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def _write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def llama3(folder: Path) -> None:
    """Two ends, one of them the tokenizer's; how to sample; the class that only the newest release knows."""
    tokenizer = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin, end, turn = (tokenizer.token_to_id(each) for each in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))
    write_model(folder, tokenizer.get_vocab_size(), bos_token_id=begin, eos_token_id=[end, turn])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": TEMPLATE}
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", **named})
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    _write(folder, "generation_config.json", {"bos_token_id": begin, "eos_token_id": [end, turn], **sampling})


def llama3_base(folder: Path) -> None:
    """No generation settings: config.json alone has the ids."""
    tokenizer = byte_level(["<|begin_of_text|>", "<|end_of_text|>"])
    begin, end = (tokenizer.token_to_id(each) for each in ("<|begin_of_text|>", "<|end_of_text|>"))
    write_model(folder, tokenizer.get_vocab_size(), bos_token_id=begin, eos_token_id=end, pad_token_id=end)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})


def chat_markers(folder: Path) -> None:
    """`<|endoftext|>` is in the vocabulary, and texts end with `<|im_end|>`; the template is a file."""
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    end = tokenizer.token_to_id("<|im_end|>")
    write_model(folder, tokenizer.get_vocab_size(), bos_token_id=end - 1, eos_token_id=end, tie_word_embeddings=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False},
    }
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **named})
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def unnamed_end(folder: Path) -> None:
    """No tokenizer_config.json: only config.json says which id ends a text. More rows than tokens."""
    tokenizer = byte_level(["<start>", "<stop>"])
    write_model(
        folder, 2000, bos_token_id=tokenizer.token_to_id("<start>"), eos_token_id=tokenizer.token_to_id("<stop>")
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def gpt2_files(folder: Path) -> None:
    """vocab.json and merges.txt; the vocabulary has a token called model."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>", "model"])
    tokenizer.train_from_iterator(TEXT, trainer)
    write_model(folder, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0)
    tokenizer.model.save(str(folder))


def gpt2_files_with_more(folder: Path) -> None:
    """The two files of GPT-2 and tokens added beside them."""
    gpt2_files(folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    write_model(folder, size + 2, bos_token_id=0, eos_token_id=size + 1)
    _write(folder, "added_tokens.json", {"<|im_start|>": size, "<|im_end|>": size + 1})
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"})


def sentence_piece(folder: Path, algorithm: str = "bpe", **config: Any) -> None:
    """tokenizer.model alone, as LLaMA 1 and 2 came."""
    made = io.BytesIO()
    marks = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "byte_fallback": True, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=made, vocab_size=340, model_type=algorithm, minloglevel=2, **marks
    )
    size = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue()).get_piece_size()
    write_model(folder, size, bos_token_id=1, eos_token_id=2)
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **config})


def llama_class(folder: Path, kind: str = "LlamaTokenizer", *, full: bool, **config: Any) -> None:
    """LLaMA 2's tokenizer; whole: as a tokenizer.json whose older normalizer puts a blank before every text."""
    sentence_piece(folder, **config)
    file = folder / "tokenizer.model"
    if full:
        (folder / "tokenizer_config.json").unlink()
        content = as_tokenizer_json(SPMTokenizer(str(file)), file)
        assert content is not None
        assert '"Prepend"' in content
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        file.unlink()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write(folder, "tokenizer_config.json", {"tokenizer_class": kind, **named, **config})


def sentence_piece_with_more(folder: Path, *, described: bool) -> None:
    """ChatML's marks added to a tokenizer.model; described: in tokenizer_config.json, else in a file of its own."""
    sentence_piece(folder)
    size = LlamaConfig.from_pretrained(folder).vocab_size
    write_model(folder, size + 2, bos_token_id=1, eos_token_id=size + 1)
    added = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": size, "<|im_end|>": size + 1}
    reported: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>", "bos_token": "<s>"}
    if described:
        reported["add_bos_token"] = True
        reported["added_tokens_decoder"] = {
            str(number): {"content": token, "special": True, "normalized": False} for token, number in added.items()
        }
    else:
        _write(folder, "added_tokens.json", added)
    _write(folder, "tokenizer_config.json", reported)


def full_with_more(folder: Path) -> None:
    """A tokenizer.json, and tokens in added_tokens.json that it lacks."""
    llama3_base(folder)
    size = LlamaConfig.from_pretrained(folder).vocab_size
    write_model(folder, size + 2, bos_token_id=size, eos_token_id=size + 1)
    _write(folder, "added_tokens.json", {"<|im_start|>": size, "<|im_end|>": size + 1})
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"})


FOLDERS: dict[str, Callable[[Path], None]] = {
    "llama 3": llama3,
    "llama 3, base": llama3_base,
    "chat markers": chat_markers,
    "unnamed end": unnamed_end,
    "gpt2 files": gpt2_files,
    "gpt2 files with more": gpt2_files_with_more,
    "sentencepiece": sentence_piece,
    "sentencepiece, unigram": lambda folder: sentence_piece(folder, "unigram"),
    "sentencepiece with more": lambda folder: sentence_piece_with_more(folder, described=False),
    "sentencepiece with more, described": lambda folder: sentence_piece_with_more(folder, described=True),
    "tokenizer.json with more": full_with_more,
    "llama 2": lambda folder: llama_class(folder, full=True),
    "llama 2 without a first blank": lambda folder: llama_class(folder, full=True, add_prefix_space=False),
}
"""Name -> writes the folder."""
EXPECTED: dict[str, tuple[str, str, list[str], dict[str, Any]]] = {
    "llama 3": (
        "PretrainedFromHF",
        "<|eot_id|>",
        ["<|end_of_text|>", "<|eot_id|>"],
        {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
    ),
    "llama 3, base": ("PretrainedFromHF", "<|end_of_text|>", ["<|end_of_text|>"], {}),
    "chat markers": ("PretrainedFromHF", "<|im_end|>", ["<|im_end|>"], {}),
    "unnamed end": ("PretrainedFromHF", "<stop>", ["<stop>"], {}),
    "gpt2 files": ("GPT2BPETokenizer", "<|endoftext|>", ["<|endoftext|>"], {}),
    "gpt2 files with more": ("PretrainedFromHF", "<|im_end|>", ["<|im_end|>"], {}),
    "sentencepiece": ("SPMTokenizer", "</s>", ["</s>"], {}),
    "sentencepiece, unigram": ("SPMTokenizer", "</s>", ["</s>"], {}),
    "sentencepiece with more": ("PretrainedFromHF", "<|im_end|>", ["<|im_end|>"], {}),
    "sentencepiece with more, described": ("PretrainedFromHF", "<|im_end|>", ["<|im_end|>"], {}),
    "tokenizer.json with more": ("PretrainedFromHF", "<|im_end|>", ["<|im_end|>"], {}),
    "llama 2": ("PretrainedFromHF", "</s>", ["</s>"], {}),
    "llama 2 without a first blank": ("PretrainedFromHF", "</s>", ["</s>"], {}),
}
"""Name -> tokenizer_type, the token that ends a text, all that do, and how the folder samples."""
