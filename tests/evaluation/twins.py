"""A small model of `transformers` beside ours with the same weights and tokenizer, as lm-eval sees both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from megatron.engine.engine import Engine
from megatron.evaluation.lm_eval_model import HarnessModel
from megatron.tokenizers import Tokenizer, make_tokenizer
from megatron.tokenizers.chat_template import ChatTemplate

LENGTH = 96


@dataclass
class Twins:
    """folder: of theirs. lm: lm-eval's own `hf` model over theirs. model: ours."""

    folder: Path
    tokenizer: Tokenizer
    engine: Engine
    theirs: Any
    lm: Any

    def model(self, **how: Any) -> HarnessModel:
        """Ours, as lm-eval sees it."""
        settings = {"max_length": LENGTH, "batch_size": 3, "vocabulary": self.theirs.config.vocab_size, **how}
        return HarnessModel(self.engine, self.tokenizer, **settings)

    def chat(self) -> ChatTemplate:
        return ChatTemplate.of_folder(self.folder)


def twins(folder: Path, kind: str, file: str = "") -> Twins:
    """Random weights for the tokenizer in a folder. kind: of our tokenizer, from that file of the folder."""
    from lm_eval.models.huggingface import HFLM

    words = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(words) + 3,  # rows beyond the tokenizer's tokens, as real models have them
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    theirs = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
        theirs.lm_head.weight[len(words) :] = 0.0  # some probability, and never the largest
    theirs.save_pretrained(folder)
    made = adopt(Folder.open(folder), folder / "ours")
    reported = {**made.settings, "load": str(folder / "ours"), "seq_length": LENGTH, "user_script": "generate.py"}
    engine = build_inference_engine(
        resolve([], reported, Resources(1)).config.for_inference(), Topology.single(), made.rows
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    lm = HFLM(pretrained=theirs, tokenizer=words, batch_size=3, max_length=LENGTH, device="cpu")
    return Twins(folder, make_tokenizer(kind, vocab_file=str(folder / file)), engine, theirs, lm)
