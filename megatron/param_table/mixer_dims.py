"""Sizes of blocks without attention; as plain as the other sizes in dims.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Mamba2Dims:
    """Sizes of Mamba-2 blocks, and what decides their values; no heads in a model without such blocks."""

    heads: int = 0
    """Heads."""
    head: int = 64
    """Width of a head."""
    state: int = 128
    """State of each feature of a head."""
    groups: int = 8
    """Groups of heads that share B and C, and a norm."""
    limits: tuple[float | None, float | None] = (None, None)
    """Smallest and largest step; None for no bound."""
    norm_before_gate: bool = False
    """Whether the norm is before the gate."""
    epsilon: float = 1e-5
    """Added to the mean square by the norm."""

    @classmethod
    def of(cls, model: Any, mixers: Any) -> Mamba2Dims:
        """Reads objects with the keys of the configuration's model and mixers sections."""
        low, high = mixers.mamba_dt_limit or (None, None)
        return cls(
            heads=mixers.mamba_num_heads or 2 * model.hidden_size // mixers.mamba_head_dim,
            head=mixers.mamba_head_dim,
            state=mixers.mamba_state_dim,
            groups=mixers.mamba_num_groups,
            limits=(low, high),
            norm_before_gate=mixers.mamba_norm_before_gate,
            epsilon=model.rms_norm_epsilon,
        )

    @property
    def inner(self) -> int:
        """Features of all heads."""
        return self.heads * self.head

    @property
    def mixed(self) -> tuple[int, int, int]:
        """Channels of the convolution: the heads' features, and B and C of all groups."""
        return self.inner, self.groups * self.state, self.groups * self.state


@dataclass(frozen=True)
class DeltaDims:
    """Sizes of gated delta nets."""

    key_heads: int = 16
    """Heads of queries and keys."""
    value_heads: int = 32
    """Heads of values; those of one key head are beside each other."""
    key: int = 128
    """Width of a query and of a key."""
    value: int = 128
    """Width of a value."""
    convolution: int = 4
    """Width of the convolution."""
    epsilon: float = 1e-6
    """Added to the mean square by the norm of the output."""

    @classmethod
    def of(cls, model: Any, mixers: Any) -> DeltaDims:
        """Reads objects with the keys of the configuration's model and mixers sections."""
        return cls(
            key_heads=mixers.linear_num_key_heads,
            value_heads=mixers.linear_num_value_heads,
            key=mixers.linear_key_head_dim,
            value=mixers.linear_value_head_dim,
            convolution=mixers.linear_conv_kernel_dim,
            epsilon=model.rms_norm_epsilon,
        )

    @property
    def value_size(self) -> int:
        """Features of all value heads."""
        return self.value_heads * self.value

    @property
    def mixed(self) -> tuple[int, int, int]:
        """Channels of the convolution: queries, keys, values."""
        return self.key_heads * self.key, self.key_heads * self.key, self.value_size

    @property
    def projected(self) -> tuple[int, ...]:
        """Outputs of the projection of the input: those channels, the gate, strengths, decays."""
        return *self.mixed, self.value_size, self.value_heads, self.value_heads


@dataclass(frozen=True)
class MixerDims:
    """Widths of Mamba, Mamba-2, RWKV and gMLP blocks; 0 in a model without such blocks."""

    mamba_inner: int = 0
    """Channels of Mamba."""
    mamba_state: int = 16
    """State of a channel."""
    mamba_convolution: int = 4
    """Width of the convolution, of Mamba-2 too."""
    mamba_rank: int = 0
    """Rank of the step projection."""
    mamba_conv_bias: bool = True
    """Whether the convolution of Mamba and Mamba-2 has a bias."""
    mamba_linear_bias: bool = False
    """Whether the projections of Mamba and Mamba-2 have biases."""
    mamba2: Mamba2Dims = field(default_factory=Mamba2Dims)
    """Sizes of Mamba-2."""
    delta: DeltaDims = field(default_factory=DeltaDims)
    """Sizes of gated delta nets."""
    rwkv_attention: int = 0
    """Width of RWKV's time mixing."""
    rwkv_head: int = 0
    """Width of one of its heads."""
    rwkv_ffn: int = 0
    """Width of its channel mixing."""
    gmlp_positions: int = 0
    """Positions that a gMLP mixes."""
    gmlp_width: int = 0
    """Width of each half of a gMLP."""
    gmlp_attention: int = 0
    """Width of aMLP's small attention."""

    @classmethod
    def of(cls, model: Any, mixers: Any) -> MixerDims:
        """Reads objects with the keys of the configuration's model and mixers sections."""
        hidden = model.hidden_size
        attention = mixers.dim_att or hidden
        return cls(
            mamba_inner=2 * hidden,
            mamba_rank=-(-hidden // 16),
            mamba_conv_bias=mixers.mamba_use_bias_in_conv,
            mamba_linear_bias=mixers.mamba_use_bias_in_linears,
            mamba2=Mamba2Dims.of(model, mixers),
            delta=DeltaDims.of(model, mixers),
            rwkv_attention=attention,
            rwkv_head=mixers.head_size or attention // model.num_attention_heads,
            rwkv_ffn=mixers.ffn_dim or rwkv_ffn_width(hidden, model.intermediate_size, model.expansion_factor),
            gmlp_positions=model.seq_length,
            gmlp_width=model.mlp_width,
            gmlp_attention=mixers.gmlp_attn_dim,
        )


def rwkv_ffn_width(hidden: int, intermediate_size: int | None, expansion_factor: float | None) -> int:
    """Returns the width of the channel mixing: 3.5 x hidden_size by default, rounded down to a multiple of 32."""
    return (intermediate_size or int((expansion_factor or 3.5) * hidden)) // 32 * 32
