"""Blocks that mix tokens by other means than attention: Mamba, Mamba-2, RWKV, gMLP and gated delta nets."""

from megatron.config.field import Section, key
from megatron.config.types import Items


class MixersSection(Section):
    """Mamba, Mamba-2, RWKV, gMLP and gated delta nets."""

    mamba_selective_fp32_params: bool = key(
        True, "Keep Mamba's A and D in fp32; DeepSpeed casts every parameter, and its optimizers keep fp32 copies."
    )
    mamba_use_bias_in_conv: bool = key(True, "Give the convolution of mamba and mamba2 blocks a bias.")
    mamba_use_bias_in_linears: bool = key(False, "Give the projections of mamba and mamba2 blocks a bias.")
    mamba_num_heads: int | None = key(
        None, "Heads of a mamba2 block; 2 x hidden_size / mamba_head_dim when left out.", unit="heads"
    )
    mamba_head_dim: int = key(64, "Width of a head of a mamba2 block.", unit="features")
    mamba_state_dim: int = key(128, "State of each feature of a mamba2 block.", unit="features")
    mamba_num_groups: int = key(8, "Groups of heads of a mamba2 block that share B and C, and a norm.", unit="groups")
    mamba_dt_limit: Items | None = key(
        None, "Smallest and largest step of a mamba2 block, such as [0.001, null], where null is no bound."
    )
    mamba_norm_before_gate: bool = key(
        False, "Normalise what a mamba2 block gates, and gate the result; the product is normalised when false."
    )
    linear_num_key_heads: int = key(16, "Heads of queries and keys of a gated delta net.", unit="heads")
    linear_num_value_heads: int = key(
        32, "Heads of values of a gated delta net, a multiple of its key heads.", unit="heads"
    )
    linear_key_head_dim: int = key(128, "Width of a query and of a key of a gated delta net.", unit="features")
    linear_value_head_dim: int = key(128, "Width of a value of a gated delta net.", unit="features")
    linear_conv_kernel_dim: int = key(
        4, "Positions that the convolution of a gated delta net reads, the own included.", unit="tokens"
    )
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
