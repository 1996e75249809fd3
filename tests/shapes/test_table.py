"""The tensor table against figures worked out elsewhere: public model sizes and transformers' own parameter counts."""

from types import SimpleNamespace

import pytest

from megatron.shapes import ModelDims, tensors

NEOX_20B = ModelDims(
    num_layers=44,
    hidden_size=6144,
    num_attention_heads=64,
    num_kv_heads=64,
    head_dim=96,
    mlp_width=24576,
    pos_emb="rotary",
    max_position_embeddings=2048,
    tied=False,
    gpt_j_residual=True,
)
LLAMA3_8B = ModelDims(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14336,
    gated=True,
    norm="rmsnorm",
    attention_bias=False,
    mlp_bias=False,
    pos_emb="rotary",
    tied=False,
)


def test_public_models_have_their_published_parameter_counts() -> None:
    # Model cards: 20,554,567,680 for GPT-NeoX-20B at its vocabulary of 50,432; 8,030,261,248 for Llama 3 8B.
    assert sum(tensor.count for tensor in tensors(NEOX_20B, 50432)) == 20_554_567_680
    assert sum(tensor.count for tensor in tensors(LLAMA3_8B, 128256)) == 8_030_261_248


def test_layer_indices_and_names_are_the_public_layout() -> None:
    table = {(tensor.layer, tensor.name): tensor for tensor in tensors(NEOX_20B, 50432)}
    assert table[0, "word_embeddings.weight"].shape == (50432, 6144)
    assert table[2, "attention.query_key_value.weight"].shape == (3 * 6144, 6144)
    assert table[45, "mlp.linear2.bias"].shard_dim is None
    assert table[47, "norm.bias"].kind == "norm"
    assert table[48, "final_linear.weight"].shard_dim == 0
    assert not any(layer in (1, 46) for layer, _ in table)


def test_tied_head_and_shared_norm_own_nothing() -> None:
    fields = {**vars(NEOX_20B), "tied": True, "gpt_j_tied": True, "num_layers": 2}
    table = tensors(ModelDims(**fields), 64)
    assert max(tensor.layer for tensor in table) == 5
    assert not any("post_attention_layernorm" in tensor.name for tensor in table)


def test_grouped_rows_are_cut_section_by_section() -> None:
    by_name = {tensor.name: tensor for tensor in tensors(LLAMA3_8B, 128256) if tensor.layer == 2}
    qkv = by_name["attention.query_key_value.weight"]
    assert qkv.slices(1, 4) == ((1024, 2048), (4096 + 256, 4096 + 512), (5120 + 256, 5120 + 512))
    assert qkv.local_shape(4) == (1536, 4096)
    assert by_name["mlp.linear1.weight"].slices(1, 2) == ((7168, 14336), (21504, 28672))
    assert by_name["mlp.linear2.weight"].local_shape(8) == (4096, 1792)


def test_skipped_rows_stand_before_the_learned_positions() -> None:
    fields = {**vars(NEOX_20B), "pos_emb": "learned", "position_offset": 2, "num_layers": 1}
    table = {tensor.name: tensor for tensor in tensors(ModelDims(**fields), 64)}
    assert table["position_embeddings.weight"].shape == (2050, 6144)


def test_an_uneven_cut_is_refused() -> None:
    by_name = {tensor.name: tensor for tensor in tensors(LLAMA3_8B, 128256)}
    with pytest.raises(ValueError, match="does not divide by 3"):
        by_name["attention.query_key_value.weight"].local_shape(3)


def test_dims_read_from_a_model_section() -> None:
    section = SimpleNamespace(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_kv_heads=None,
        kv_channels=None,
        mlp_width=256,
        activation="swiglu",
        norm="rmsnorm",
        use_bias_in_norms=True,
        use_qk_layernorm=False,
        use_bias_in_attn_linear=False,
        use_bias_in_mlp=False,
        pos_emb="learned",
        max_position_embeddings=32,
        no_weight_tying=True,
        gpt_j_residual=False,
        gpt_j_tied=False,
    )
    dims = ModelDims.of(section)
    assert (dims.head_dim, dims.num_kv_heads, dims.gated, dims.tied) == (16, 4, True, False)


@pytest.mark.parametrize(("field", "value"), [("num_layers", 0), ("num_kv_heads", 3)])
def test_impossible_dims_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError):
        ModelDims(**{**vars(NEOX_20B), field: value})
