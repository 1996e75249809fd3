"""Tokenizer folders of several kinds, as models of `transformers` have them, learnt from a few lines."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "the quick brown fox jumps over the lazy dog. it was a dark and stormy night, and the rain fell in torrents.",
    "Hello world, this is a small test of numbers 0 1 2 3 4 5 6 7 8 9 and names.",
    "def read(self, n):\n    return self.data[:n]\n",
] * 5
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def llama2(folder: Path) -> Path:
    """A blank before the text, pieces of bytes, `<s>` by the post-processor, a decoder that strips the first blank."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [f"<0x{byte:02X}>" for byte in range(256)]
    _learn(tokenizer, 600, ["<unk>", "<s>", "</s>", *parts])
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = made["added_tokens"][:3]  # pieces of bytes are ordinary
    made["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.post_processor = begins_with("<s>", 1)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _saved(folder, tokenizer, "LlamaTokenizer", add_bos_token=True, chat_template=INST, **names)


def llama3(folder: Path, *, begins: bool = True) -> Path:
    """Byte-level BPE with headers, a turn's end beside the text's, and the begin token in a sequence of processors."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(special)
    if begins:
        begin = begins_with(special[0], tokenizer.token_to_id(special[0]))
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    names = {"bos_token": special[0], "eos_token": special[4]}
    return _saved(folder, tokenizer, "PreTrainedTokenizerFast", chat_template=HEADERS, **names)


def chatml(folder: Path, **config: Any) -> Path:
    """Byte-level BPE that puts nothing before a text, with marks of turns."""
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML}
    return _saved(folder, tokenizer, "GPT2TokenizerFast", **names | config)


def byte_level_by(pattern: str, texts: list[str], *, nfc: bool = True) -> Tokenizer:
    """Byte-level BPE, trained on the texts, that splits them by a pattern first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts * 4, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    return tokenizer


def gpt2(folder: Path, **config: Any) -> Path:
    """vocab.json with merges.txt, and no tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _learn(tokenizer, 400, ["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    end = "<|endoftext|>"
    names = {"bos_token": end, "eos_token": end, "unk_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **names, **config}))
    return folder


def sentence_piece(folder: Path, **config: Any) -> Path:
    """A sentencepiece model as LLaMA's: no normalisation, pieces of bytes."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names, **config}))
    return folder


def byte_level(special: list[str]) -> Tokenizer:
    """Byte-level BPE whose special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _learn(tokenizer, 500, [])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def begins_with(token: str, number: int) -> processors.TemplateProcessing:
    """Puts a token before each text."""
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])


def _learn(tokenizer: Tokenizer, size: int, special: list[str]) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if tokenizer.pre_tokenizer is not None else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)


def _saved(folder: Path, tokenizer: Tokenizer, kind: str, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **config}))
    return folder
