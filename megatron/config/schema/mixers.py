"""Blocks that mix tokens by other means than attention: Mamba, RWKV and gMLP."""

from megatron.config.field import Section, key


class MixersSection(Section):
    """Mamba, RWKV and gMLP."""

    mamba_selective_fp32_params: bool = key(
        True, "Keep Mamba's A and D in fp32; DeepSpeed casts every parameter, and its optimizers keep fp32 copies."
    )
    mamba_use_bias_in_conv: bool = key(True, "Give Mamba's convolution a bias.")
    mamba_use_bias_in_linears: bool = key(False, "Give Mamba's projections a bias.")
    gmlp_attn_dim: int = key(64, "Width of the small attention inside an amlp block.", unit="features")
    dim_att: int | None = key(None, "Width of RWKV's time mixing; hidden_size when left out.", unit="features")
    head_size: int | None = key(
        None, "Width of one RWKV head; it must be dim_att / num_attention_heads.", unit="features"
    )
    ffn_dim: int | None = key(
        None,
        "Width of RWKV's channel mixing; intermediate_size, or 3.5 x hidden_size in 32s, when left out.",
        unit="features",
    )
