"""Positions, windows and head norms against the models of transformers that have them.

ALiBi: the attention of BLOOM. Relative positions: T5's table. Sinusoids: Marian's. Scaled rotary positions: the
frequencies of every type, and whole Llama and GPT-NeoX models. Windows: Mistral. Norms of queries and keys: Qwen3.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from megatron.checkpoint.huggingface.families import FAMILIES
from megatron.model.positions.alibi import slopes
from megatron.model.positions.rope_frequencies import scaled
from megatron.model.positions.sinusoidal import SinusoidalPositions
from megatron.model.sequential_model import SequentialModel
from megatron.param_table import ModelDims
from tests.model.sections import LLAMA, VOCABULARY, build, disturb, model_section

LENGTH, CPU = 40, torch.device("cpu")
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 176, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
DECODER |= {"initializer_range": 0.1, "attn_implementation": "eager", "tie_word_embeddings": False}


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("heads", [4, 12])
def test_alibi_is_blooms(heads: int) -> None:
    """A number of heads that is no power of two as well; the whole attention of a block."""
    torch.manual_seed(1)
    size = 16 * heads
    config = BloomConfig(hidden_size=size, n_head=heads, n_layer=1, hidden_dropout=0.0, attention_dropout=0.0)
    theirs = BloomAttention(config, layer_idx=0).eval()
    ours = (
        build(
            num_layers=1, hidden_size=size, num_attention_heads=heads, num_kv_heads=heads, pos_emb="alibi", mlp_width=64
        )
        .sequential[2]
        .attention
    )
    with torch.no_grad():
        for name in ("query_key_value", "dense"):
            for kind in ("weight", "bias"):
                value = torch.randn_like(getattr(getattr(theirs, name), kind)) * 0.1
                getattr(getattr(theirs, name), kind).copy_(value)
                getattr(getattr(ours, name), kind).copy_(value)
        x = torch.randn(2, LENGTH, size)
        alibi = build_alibi_tensor(torch.ones(2, LENGTH), heads, torch.float32)
        mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None].expand(2, 1, -1, -1)
        expected = theirs(x, torch.zeros_like(x), alibi=alibi, attention_mask=mask)[0]
        actual = ours(x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(slopes(heads)), alibi.view(2, heads, 1, LENGTH)[0, :, 0, 1])


@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (8, 24), (7, 20)])
def test_relative_positions_are_t5s(count: int, furthest: int) -> None:
    config = T5Config(
        d_model=64,
        num_heads=4,
        d_kv=16,
        relative_attention_num_buckets=count,
        relative_attention_max_distance=furthest,
        is_decoder=True,
    )
    theirs = T5Attention(config, has_relative_attention_bias=True)
    ours = build(pos_emb="rpe", rpe_num_buckets=count, rpe_max_distance=furthest).sequential[2].attention.rpe
    with torch.no_grad():
        ours.weight.copy_(theirs.relative_attention_bias.weight)
        bias = theirs.compute_bias(300, 300, device=CPU)[0]  # [n, q, k]
        added = ours(300, CPU)  # [n, distance]
    for query in (0, 5, 40, 299):
        expected = bias[:, query, : query + 1].flip(1) * math.sqrt(16)  # by distance; scores are divided by sqrt(d)
        torch.testing.assert_close(added[:, : query + 1], expected)


def test_sinusoids_are_marians() -> None:
    theirs = MarianSinusoidalPositionalEmbedding(64, 32)
    if hasattr(theirs, "create_weight"):
        with torch.no_grad():
            theirs.weight.copy_(theirs.create_weight())
    ours = SinusoidalPositions(32, torch.float32)
    torch.testing.assert_close(ours(60, 4, None, CPU)[:, 0], theirs.weight.detach()[4:64], rtol=1e-5, atol=1e-6)


ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {**ORIGINAL, "beta_fast": 32.0, "beta_slow": 1.0},
    "llama3": {**ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize("base", [10000, 500000])
@pytest.mark.parametrize("turned", [16, 64, 128])
@pytest.mark.parametrize("kind", [*SCALINGS, "dynamic"])
def test_scaled_frequencies_are_theirs(kind: str, turned: int, base: int) -> None:
    """At real sizes: an original context of 8,192 and four times that."""
    block = {**SCALINGS.get(kind, ORIGINAL)}
    if "original_max_position_embeddings" in block:
        block["original_max_position_embeddings"] = 8192
    longest = 8192 if kind == "dynamic" else 32768  # theirs is then the original one
    reported = {name: value for name, value in block.items() if kind != "dynamic" or name == "factor"}
    config = LlamaConfig(
        hidden_size=turned,
        num_attention_heads=1,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": kind, "rope_theta": float(base), **reported},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=32768)
    actual, ours = scaled(turned, base, {"type": kind, **block}, 32768)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    assert ours == pytest.approx(factor)


def compare(theirs: Any, family: str, **changes: Any) -> None:
    """Logits of their model and of ours with its weights, through the family's table of tensors."""
    disturb(theirs)
    ours: SequentialModel = build(**changes)
    section = model_section(**changes)
    state = theirs.state_dict()
    ours.sequential.load_state_dict(
        {
            row.ours: row.together([state[name] for name in row.theirs])
            for row in FAMILIES[family].table(ModelDims.of(section))
        }
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).transpose(0, 1), theirs(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_llama(kind: str) -> None:
    torch.manual_seed(2)
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS[kind]}
    theirs = LlamaForCausalLM(LlamaConfig(**DECODER, num_key_value_heads=2, rope_parameters=parameters)).eval()
    compare(theirs, "llama", **LLAMA, num_kv_heads=2, rope_scaling={"type": kind, **SCALINGS[kind]})


def test_dynamic_llama_at_the_runs_length() -> None:
    """Theirs adapts to the text, ours to seq_length: the two agree for a text of that length."""
    torch.manual_seed(2)
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(
        **{**DECODER, "max_position_embeddings": 16}, rope_parameters=parameters, num_key_value_heads=4
    )
    scaling = {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
    compare(LlamaForCausalLM(config).eval(), "llama", **LLAMA, rope_scaling=scaling, seq_length=LENGTH)


@pytest.mark.parametrize("width", [1, 7, 39, 64])
def test_windows_are_mistrals(width: int) -> None:
    torch.manual_seed(4)
    theirs = MistralForCausalLM(MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=width)).eval()
    compare(theirs, "mistral", **LLAMA, num_kv_heads=2, sliding_window_width=width)


@pytest.mark.parametrize("window", [None, 9])
def test_head_norms_are_qwens(window: int | None) -> None:
    torch.manual_seed(5)
    config = Qwen3Config(
        **DECODER,
        num_key_value_heads=2,
        head_dim=24,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=0,
    )
    theirs = Qwen3ForCausalLM(config).eval()
    changes = {"num_kv_heads": 2, "kv_channels": 24, "use_qk_layernorm": True, "sliding_window_width": window}
    compare(theirs, "qwen3", **LLAMA, **changes)
