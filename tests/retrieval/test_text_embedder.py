"""Encoders of transformers that embed chunks: how much of a text they read, and which models are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, GPT2Config, GPT2Model, RobertaConfig, RobertaModel

from megatron.errors import ConfigError
from megatron.retrieval.text_embedder import TextEmbedder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"vocab_size": len(WORDS), "max_position_embeddings": 12}


def write(folder: Path, model: torch.nn.Module) -> Path:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize(("kind", "tokens"), [("bert", 10), ("roberta", 8)])
def test_a_text_is_read_as_far_as_the_encoder_has_positions(kind: str, tokens: int, tmp_path: Path) -> None:
    """RoBERTa's positions begin behind that of padding, which is 1; two of the tokens frame a text."""
    model = BertModel(BertConfig(**SIZES)) if kind == "bert" else RobertaModel(RobertaConfig(**SIZES, pad_token_id=1))
    embedder = TextEmbedder(write(tmp_path, model))
    long, short, empty = "a b c d e f " * 4, " ".join(("a b c d e f " * 4).split()[:tokens]), ""
    found = embedder.embed([long, short, empty], 2)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert np.isnan(found[2]).all()


def test_a_model_that_continues_text_is_no_encoder(tmp_path: Path) -> None:
    folder = write(tmp_path, GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2)))
    with pytest.raises(ConfigError, match="GPT2Model is no encoder"):
        TextEmbedder(folder)
