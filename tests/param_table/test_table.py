"""The tensor table against figures worked out elsewhere: public model sizes and transformers' own parameter counts."""

from types import SimpleNamespace

import pytest

from megatron.param_table import MixerDims, MixtureDims, ModelDims, tensors
from megatron.param_table.mixer_dims import Mamba2Dims

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


def test_a_mamba_is_as_large_as_that_of_transformers() -> None:
    """Mamba 130M, built without memory."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    with torch.device("meta"):
        theirs = MambaForCausalLM(MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280))
    mixers = MixerDims(mamba_inner=1536, mamba_rank=48)
    fields = {"hidden_size": 768, "num_attention_heads": 12, "num_kv_heads": 12, "head_dim": 64, "mlp_width": 3072}
    dims = ModelDims(num_layers=24, norm="rmsnorm", pos_emb="none", kinds=("mamba",) * 24, mixers=mixers, **fields)
    count = sum(tensor.count for tensor in tensors(dims, 50280))
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) == 129_135_360


def test_a_mamba2_is_as_large_as_that_of_transformers() -> None:
    """Mamba-2 2.7B, built without memory."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50288}
    with torch.device("meta"):
        theirs = Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=80, n_groups=1, tie_word_embeddings=True))
    mixers = MixerDims(mamba2=Mamba2Dims(heads=80, groups=1))
    fields = {"hidden_size": 2560, "num_attention_heads": 1, "num_kv_heads": 1, "head_dim": 2560, "mlp_width": 1}
    dims = ModelDims(num_layers=64, norm="rmsnorm", pos_emb="none", kinds=("mamba2",) * 64, mixers=mixers, **fields)
    count = sum(tensor.count for tensor in tensors(dims, 50288))
    assert count == sum(parameter.numel() for parameter in theirs.parameters())


PUBLIC = {
    "mamba": """norm.weight norm.bias mixer.A_log mixer.D mixer.in_proj.weight mixer.conv1d.weight mixer.conv1d.bias
        mixer.x_proj.weight mixer.dt_proj.weight mixer.dt_proj.bias mixer.out_proj.weight""",
    "rwkv": """ln1.weight ln1.bias ln2.weight ln2.bias att.time_maa_x att.time_maa_w att.time_maa_k att.time_maa_v
        att.time_maa_r att.time_maa_g att.time_maa_w1 att.time_maa_w2 att.time_decay att.time_decay_w1 att.time_decay_w2
        att.time_faaaa att.receptance.weight att.key.weight att.value.weight att.output.weight att.gate.weight
        att.ln_x.weight att.ln_x.bias ffn.time_maa_k ffn.time_maa_r ffn.key.weight ffn.receptance.weight
        ffn.value.weight""",
    "gmlp": """norm.weight norm.bias input_linear.weight input_linear.bias sgu.norm.weight sgu.norm.bias sgu.proj.weight
        sgu.proj.bias output_linear.weight output_linear.bias""",
    "global": """input_layernorm.weight input_layernorm.bias attention.query_key_value.weight
        attention.query_key_value.bias attention.dense.weight attention.dense.bias post_attention_layernorm.weight
        post_attention_layernorm.bias mlp.router.layer.weight mlp.experts.mlp.w1 mlp.experts.mlp.w2""",
}
"""The names in public checkpoints; a block with attention has experts here."""


@pytest.mark.parametrize("kind", PUBLIC)
def test_blocks_have_the_public_names(kind: str) -> None:
    mixers = MixerDims(
        128, mamba_rank=4, rwkv_attention=64, rwkv_head=16, rwkv_ffn=224, gmlp_positions=8, gmlp_width=64
    )
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_width": 256}
    mixture = MixtureDims(experts=4, interval=2)
    dims = ModelDims(num_layers=2, kinds=(kind, "global"), mixers=mixers, mixture=mixture, **fields)
    table = tensors(dims, 96)
    assert {tensor.name for tensor in table if tensor.layer == 2} == set(PUBLIC[kind].split())
    assert "mlp.linear1.weight" in {tensor.name for tensor in table if tensor.layer == 3}  # interval 2


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
