"""The output gate of attention is that of transformers' Qwen3-Next, forward and backward.

A gate of another input, of other heads, before the core or without its sigmoid breaks this.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

from megatron.config import Resources, resolve
from tests.model.sections import build

HIDDEN, HEADS, KEY_HEADS, WIDTH, LENGTH = 64, 4, 2, 16, 12


def theirs() -> Qwen3NextAttention:
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=WIDTH,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        attn_implementation="eager",
    )
    torch.manual_seed(1)
    module = Qwen3NextAttention(config, 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def test_it_is_that_of_transformers() -> None:
    other = theirs()
    ours: Any = build(
        num_kv_heads=KEY_HEADS, norm="rmsnorm_1p", use_qk_layernorm=True, attention_output_gate=True
    ).sequential[2]
    attention = ours.attention
    with torch.no_grad():
        query, gate = other.q_proj.weight.view(HEADS, 2, WIDTH, HIDDEN).unbind(1)
        bias, gate_bias = other.q_proj.bias.view(HEADS, 2, WIDTH).unbind(1)
        parts = (query.flatten(0, 1), other.k_proj.weight, other.v_proj.weight)
        attention.query_key_value.weight.copy_(torch.cat(parts))
        attention.query_key_value.bias.copy_(torch.cat((bias.flatten(), other.k_proj.bias, other.v_proj.bias)))
        attention.output_gate.weight.copy_(gate.flatten(0, 1))
        attention.output_gate.bias.copy_(gate_bias.flatten())
        for mine, source in ((attention.dense.weight, other.o_proj.weight), (attention.dense.bias, other.o_proj.bias)):
            mine.copy_(source)
        attention.q_layernorm.scale.copy_(other.q_norm.weight)
        attention.k_layernorm.scale.copy_(other.k_norm.weight)
    x = torch.randn(2, LENGTH, HIDDEN, requires_grad=True)
    positions = Qwen3NextRotaryEmbedding(other.config)(x, torch.arange(LENGTH)[None])
    causal = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    expected, _ = other(x, positions, causal)
    found = attention(x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(expected)
    reference = torch.autograd.grad(expected, [x, other.q_proj.weight], direction)
    grads = torch.autograd.grad(found, [x, attention.query_key_value.weight, attention.output_gate.weight], direction)
    torch.testing.assert_close(grads[0], reference[0], rtol=1e-4, atol=1e-4)
    rows = torch.stack((grads[1][: HEADS * WIDTH].view(HEADS, WIDTH, -1), grads[2].view(HEADS, WIDTH, -1)), 1)
    torch.testing.assert_close(rows.flatten(0, 2), reference[1], rtol=1e-4, atol=1e-4)


def test_all_updates_are_of_the_gate_too() -> None:
    keys = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 8, "train_iters": 1}
    keys |= {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
    for gated, expected in ((True, ["output_gate"]), (False, [])):
        given = {**keys, "lora": {"rank": 2, "targets": "all"}, "attention_output_gate": gated}
        block = resolve([], given, Resources(1)).config.model.lora
        assert block is not None
        assert [name for name in block["targets"] if name == "output_gate"] == expected
