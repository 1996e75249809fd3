"""The plain numbers and flags that decide which tensors a model has.

``ModelDims`` is what the shape table, the planner and the checkpoint converters share. It holds no torch type and no
configuration type: ``ModelDims.of`` reads any object that carries the configuration's model keys as attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.adapter_config import LowRank, low_rank, prompt_length
from megatron.registry import ACTIVATIONS, POSITIONS, WITHOUT_ATTENTION


@dataclass(frozen=True)
class MixtureDims:
    """Which blocks have experts in place of one MLP, and how many of them a token visits.

    Block i has them where `interval` divides i. With one expert no block has.
    """

    experts: int = 1
    interval: int = 1
    top_k: int = 1

    @classmethod
    def of(cls, moe: Any) -> MixtureDims:
        """Read from an object with the keys of the configuration's moe section."""
        return cls(moe.moe_num_experts, moe.moe_expert_interval, moe.moe_top_k)


@dataclass(frozen=True)
class MixerDims:
    """Widths of the blocks that mix tokens by other means than attention; 0 in a model without such blocks.

    mamba_*: channels, state of a channel, width of the convolution, rank of the step. rwkv_*: of the time mixing, of
    its heads, and of the channel mixing. gmlp_*: positions that are mixed, width of each half, width of the small
    attention.
    """

    mamba_inner: int = 0
    mamba_state: int = 16
    mamba_convolution: int = 4
    mamba_rank: int = 0
    mamba_conv_bias: bool = True
    mamba_linear_bias: bool = False
    rwkv_attention: int = 0
    rwkv_head: int = 0
    rwkv_ffn: int = 0
    gmlp_positions: int = 0
    gmlp_width: int = 0
    gmlp_attention: int = 0

    @classmethod
    def of(cls, model: Any, mixers: Any) -> MixerDims:
        """Read from objects with the keys of the configuration's model and mixers sections."""
        hidden = model.hidden_size
        attention = mixers.dim_att or hidden
        return cls(
            mamba_inner=2 * hidden,
            mamba_rank=-(-hidden // 16),
            mamba_conv_bias=mixers.mamba_use_bias_in_conv,
            mamba_linear_bias=mixers.mamba_use_bias_in_linears,
            rwkv_attention=attention,
            rwkv_head=mixers.head_size or attention // model.num_attention_heads,
            rwkv_ffn=mixers.ffn_dim or rwkv_ffn_width(hidden, model.intermediate_size, model.expansion_factor),
            gmlp_positions=model.seq_length,
            gmlp_width=model.mlp_width,
            gmlp_attention=mixers.gmlp_attn_dim,
        )


def rwkv_ffn_width(hidden: int, intermediate_size: int | None, expansion_factor: float | None) -> int:
    """The width of the channel mixing as the public layout has it: 3.5 x hidden_size unless told, down to 32s."""
    return (intermediate_size or int((expansion_factor or 3.5) * hidden)) // 32 * 32


@dataclass(frozen=True)
class ModelDims:
    """Sizes and flags of one transformer. All sizes are global (before tensor parallelism)."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int  # input width of linear2; linear1 has twice as many outputs where the activation is gated
    gated: bool = False  # linear1 has two halves: the plain (up) one, then the activated (gate) one
    norm: str = "layernorm"
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    pos_emb: str = "learned"
    max_position_embeddings: int = 0
    position_offset: int = 0  # rows of the learned positions before the first one
    tied: bool = True  # the output layer shares the word embedding's weight
    gpt_j_residual: bool = False
    qk_norm: bool = False  # queries and keys of each head have a norm each
    rpe_buckets: int = 0  # rows of the table of relative positions that all blocks share
    gpt_j_tied: bool = False  # with gpt_j_residual: attention and MLP share one norm
    kinds: tuple[str, ...] = ()  # what mixes tokens in each block, by its name in attention_config; (): all "global"
    mixture: MixtureDims = field(default_factory=MixtureDims)
    mixers: MixerDims = field(default_factory=MixerDims)
    low_rank: LowRank | None = None  # updates of matrices; everything else is frozen then
    prompt: int = 0  # vectors of a learned prompt; everything else is frozen then

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} key/value heads do not divide {self.num_attention_heads} heads")

    @property
    def position_rows(self) -> int:
        """Rows of a table of learned positions."""
        return self.max_position_embeddings + self.position_offset

    @classmethod
    def of(cls, model: Any, moe: Any = None, mixers: Any = None) -> ModelDims:
        """Read the dimensions from objects with the configuration's keys as attributes.

        model: its model section. moe: its moe section; left out, no block has experts. mixers: its mixers section,
        which blocks without attention need.
        """
        heads = model.num_attention_heads
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=heads,
            num_kv_heads=model.num_kv_heads or heads,
            head_dim=getattr(model, "kv_channels", None) or model.hidden_size // heads,
            mlp_width=model.mlp_width,
            gated=ACTIVATIONS.entry(model.activation).gated,
            norm=model.norm,
            norm_bias=model.use_bias_in_norms,
            attention_bias=model.use_bias_in_attn_linear,
            mlp_bias=model.use_bias_in_mlp,
            pos_emb=model.pos_emb,
            max_position_embeddings=model.max_position_embeddings,
            position_offset=getattr(model, "opt_pos_emb_offset", 0),
            tied=not model.no_weight_tying,
            qk_norm=model.use_qk_layernorm,
            rpe_buckets=model.rpe_num_buckets if "rpe_num_buckets" in POSITIONS.entry(model.pos_emb).settings else 0,
            gpt_j_residual=model.gpt_j_residual,
            gpt_j_tied=model.gpt_j_tied,
            kinds=tuple(getattr(model, "attention_config", None) or ()),
            mixture=MixtureDims() if moe is None else MixtureDims.of(moe),
            mixers=MixerDims() if mixers is None else MixerDims.of(model, mixers),
            low_rank=low_rank(getattr(model, "lora", None)),
            prompt=prompt_length(getattr(model, "soft_prompt_tuning", None)),
        )

    def kind(self, block: int) -> str:
        """What mixes tokens in a block, by its name in attention_config."""
        return self.kinds[block] if self.kinds else "global"

    def has_experts(self, block: int) -> bool:
        """Whether a block has a mixture of experts in place of one MLP."""
        attends = self.kind(block) not in WITHOUT_ATTENTION
        return attends and self.mixture.experts > 1 and block % self.mixture.interval == 0

    @property
    def frozen(self) -> bool:
        """Whether only what was added to the model is trained."""
        return self.low_rank is not None or self.prompt > 0

    def saves_input(self, target: str) -> bool:
        """Whether what a matrix of the blocks reads is needed again for a gradient: its own, or that of its update.

        target: a name of `lora`'s targets.
        """
        return not self.frozen or (self.low_rank is not None and target in self.low_rank.targets)

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (the value heads are as wide)."""
        return self.num_kv_heads * self.head_dim

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key/value head; it decides the row order of the QKV weight."""
        return self.num_kv_heads != self.num_attention_heads

    @property
    def shared_norm(self) -> bool:
        """Whether a block has one norm (gpt_j_tied) in place of two."""
        return self.gpt_j_residual and self.gpt_j_tied
