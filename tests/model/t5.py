"""Small T5s of transformers beside ours with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from megatron.model.sequential_model import SequentialModel
from tests.model.sections import VOCABULARY, build, disturb

ENCODER, DECODER, HEADS, HIDDEN, WIDTH = 2, 3, 4, 64, 176
SOURCE, TARGET = 24, 10
FORMS: dict[str, dict[str, Any]] = {
    "t5": {"activation": "relu", "no_weight_tying": False, "logit_scale": HIDDEN**-0.5},
    "t5 1.1": {"activation": "geglu_tanh", "no_weight_tying": True},
}
"""What makes a section a T5, and one of version 1.1."""
PUBLIC: dict[str, Any] = {
    "num_layers": ENCODER + DECODER,
    "encoder_num_layers": ENCODER,
    "encoder_seq_length": SOURCE,
    "decoder_seq_length": TARGET,
    "seq_length": SOURCE + TARGET,
    "pos_emb": "relative",
    "rpe_num_buckets": 8,
    "norm": "rmsnorm",
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "softmax_scale": 1.0,
}


def transformers_t5(form: str) -> T5ForConditionalGeneration:
    """A model of transformers with a value of its own in every tensor."""
    torch.manual_seed(3)
    untied = form == "t5 1.1"
    config = T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=16, d_ff=WIDTH, num_layers=ENCODER, num_decoder_layers=DECODER,
        num_heads=HEADS, relative_attention_num_buckets=8, relative_attention_max_distance=24, dropout_rate=0.0,
        initializer_factor=1.0, feed_forward_proj="gated-gelu" if untied else "relu", tie_word_embeddings=not untied,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    if untied:  # the class ties them when it is built; released folders of version 1.1 have both matrices
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN) * 0.3)
    with torch.no_grad():
        model.shared.weight *= 0.3
    disturb(model)
    return model.train()


def under_our_names(theirs: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """Tensors of transformers, parameters or gradients, by our names."""
    found = {"0.word_embeddings.weight": theirs["shared.weight"]}
    tables = [theirs[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] for stack in STACKS]
    found["2.attention.rpe.weight"] = torch.cat(tables)
    last = ENCODER + DECODER + 3
    found[f"{ENCODER + 1}.encoder_layernorm.scale"] = theirs["encoder.final_layer_norm.weight"]
    found[f"{last}.norm.scale"] = theirs["decoder.final_layer_norm.weight"]
    if form == "t5 1.1":
        found[f"{last + 1}.final_linear.weight"] = theirs["lm_head.weight"]
    for block in range(ENCODER + DECODER):
        encodes = block < ENCODER
        prefix = f"{STACKS[not encodes]}.block.{block if encodes else block - ENCODER}.layer."
        ours, mlp = f"{block + 2}.", 1 if encodes else 2
        heads = [theirs[f"{prefix}0.SelfAttention.{name}.weight"].unflatten(0, (HEADS, -1)) for name in "qkv"]
        found[f"{ours}attention.query_key_value.weight"] = torch.stack(heads, dim=1).flatten(0, 2)
        found[f"{ours}attention.dense.weight"] = theirs[f"{prefix}0.SelfAttention.o.weight"]
        found[f"{ours}input_layernorm.scale"] = theirs[f"{prefix}0.layer_norm.weight"]
        found[f"{ours}post_attention_layernorm.scale"] = theirs[f"{prefix}{mlp}.layer_norm.weight"]
        dense = f"{prefix}{mlp}.DenseReluDense."
        names = ("wi_1", "wi_0") if form == "t5 1.1" else ("wi",)
        found[f"{ours}mlp.linear1.weight"] = torch.cat([theirs[f"{dense}{name}.weight"] for name in names])
        found[f"{ours}mlp.linear2.weight"] = theirs[f"{dense}wo.weight"]
        if not encodes:
            cross = {name: theirs[f"{prefix}1.EncDecAttention.{name}.weight"] for name in "qkvo"}
            both = [cross[name].unflatten(0, (HEADS, -1)) for name in "kv"]
            found[f"{ours}cross_attention.query.weight"] = cross["q"]
            found[f"{ours}cross_attention.key_value.weight"] = torch.stack(both, dim=1).flatten(0, 2)
            found[f"{ours}cross_attention.dense.weight"] = cross["o"]
            found[f"{ours}cross_attention_layernorm.scale"] = theirs[f"{prefix}1.layer_norm.weight"]
    return found


STACKS = ("encoder", "decoder")


def ours_with(theirs: T5ForConditionalGeneration, form: str) -> SequentialModel:
    """Our model with the weights of theirs."""
    model = build(**PUBLIC, **FORMS[form])
    source = under_our_names(dict(theirs.named_parameters()), form)
    target = {name.removeprefix("sequential."): parameter for name, parameter in model.named_parameters()}
    assert set(source) == set(target)
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)
    return model
