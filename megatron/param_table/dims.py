"""Sizes and flags that decide the tensors of a model.

``ModelDims`` is shared by the parameter table, the dry run and the checkpoint converters. It has no torch type and no
configuration type: ``ModelDims.of`` reads any object with the configuration's model keys as attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.adapter_config import EMBEDDING, HEAD, LowRank, low_rank, prompt_length
from megatron.expert_blocks import has_experts
from megatron.param_table.mixer_dims import MixerDims
from megatron.param_table.retro_dims import RetroDims
from megatron.registry import ACTIVATIONS, MASKED_HEAD, POSITIONS, RETRIEVAL_HEAD, VANILLA, WITHOUT_MLP


@dataclass(frozen=True)
class MixtureDims:
    """Sizes of the mixture of experts."""

    experts: int = 1
    """Number of experts; 1 for plain MLPs."""
    interval: int = 1
    """Block i has experts where this divides i."""
    top_k: int = 1
    """Experts of each token."""
    first_dense: int = 0
    """First blocks without experts."""
    blocks: tuple[int, ...] = ()
    """For each block whether it has experts, in place of `interval` and `first_dense`; () without a list."""
    width: int = 0
    """Inner width of an expert; 0 for that of the plain MLP."""
    bias: bool = False
    """Whether the projections of experts have biases."""
    shared_width: int = 0
    """Inner width of the shared experts together; 0 for none."""
    shared_gate: bool = False
    """Whether the shared experts have a gate."""
    router_bias: bool = False
    """Whether the router's logits have a bias."""
    correction_bias: bool = False
    """Whether the router has a bias that balances the experts."""

    @classmethod
    def of(cls, moe: Any) -> MixtureDims:
        """Reads an object with the keys of the configuration's moe section."""
        return cls(
            experts=moe.moe_num_experts,
            interval=moe.moe_expert_interval,
            top_k=moe.moe_top_k,
            first_dense=moe.moe_first_k_dense_replace,
            blocks=tuple(moe.moe_layer_freq or ()),
            width=moe.moe_ffn_hidden_size or 0,
            bias=moe.moe_use_bias_in_experts,
            shared_width=moe.moe_shared_expert_intermediate_size or 0,
            shared_gate=moe.moe_shared_expert_gate,
            router_bias=getattr(moe, "moe_use_bias_in_router", False),
            correction_bias=moe.moe_router_enable_expert_bias,
        )

    def has_experts(self, block: int) -> bool:
        """Returns whether a block that attends has experts."""
        where = {"interval": self.interval, "first_dense": self.first_dense}
        return self.experts > 1 and has_experts(block, **where, listed=self.blocks)


@dataclass(frozen=True)
class LatentDims:
    """Sizes of multi-head latent attention."""

    rank: int
    """Width of a token's latent of keys and values."""
    plain: int
    """Features of a query head without positions."""
    rotary: int
    """Rotated features of a query head; the rotated key of a token, which all heads share, is as wide."""
    value: int
    """Features of a value head."""
    query_rank: int = 0
    """Width of a token's latent of queries; 0 for queries without one."""

    @classmethod
    def of(cls, model: Any) -> LatentDims | None:
        """Reads an object with the keys of the configuration's model section; None without latent attention."""
        if not getattr(model, "multi_latent_attention", False):
            return None
        return cls(
            model.kv_lora_rank,
            model.qk_head_dim,
            model.qk_pos_emb_head_dim,
            model.v_head_dim,
            model.q_lora_rank or 0,
        )

    @property
    def query_head(self) -> int:
        """Width of a query head, and of a key head."""
        return self.plain + self.rotary

    @property
    def core(self) -> int:
        """Width of the heads that kernels see."""
        return max(self.query_head, self.value)

    @property
    def cached(self) -> int:
        """Numbers that the cache has for a token and block."""
        return self.rank + self.rotary


@dataclass(frozen=True)
class ModelDims:
    """Sizes and flags of one transformer. All sizes are global (before tensor parallelism)."""

    num_layers: int
    """Transformer blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    mlp_width: int
    """Input width of linear2; a gated linear1 has twice as many outputs."""
    gated: bool = False
    """Whether linear1 has two halves: the plain (up) one, then the activated (gate) one."""
    learned: tuple[str, ...] = ()
    """Scalars that the activation of each MLP learns."""
    norm: str = "layernorm"
    """Kind of norm."""
    norm_bias: bool = True
    """Whether norms have their optional bias."""
    attention_bias: bool = True
    """Whether the attention's output projection has a bias."""
    qkv_bias: bool | None = None
    """Whether the projections of queries, keys and values have biases; None for as the output projection."""
    mlp_bias: bool = True
    """Whether MLP projections have biases."""
    pos_emb: str = "learned"
    """Position scheme."""
    max_position_embeddings: int = 0
    """Learned positions."""
    position_offset: int = 0
    """Rows of the learned positions before the first one."""
    tied: bool = True
    """Whether the output layer shares the word embedding's weight."""
    gpt_j_residual: bool = False
    """Whether attention and MLP are parallel."""
    norm_placement: str = "pre"
    """Where a block has norms: "pre", "output", "sandwich" or "post"."""
    embedding_norm: bool = False
    """Whether a norm is behind the embeddings."""
    qk_norm: bool = False
    """Whether queries and keys of each head have a norm each."""
    qk_norm_across: bool = False
    """With qk_norm: whether one norm has the features of all heads."""
    output_gate: bool = False
    """Whether a projection of the input gates what the attention heads give."""
    value_residual: bool = False
    """Whether blocks after the first mix their values with those of the first."""
    softmax_type: str = VANILLA
    """What the softmax of scores sums besides the keys."""
    rpe_buckets: int = 0
    """Rows of the table of relative positions that all blocks share."""
    gpt_j_tied: bool = False
    """With gpt_j_residual: whether attention and MLP share one norm."""
    kinds: tuple[str, ...] = ()
    """Kind of each block by its name in attention_config; () for "global" only."""
    mixture: MixtureDims = field(default_factory=MixtureDims)
    """Mixture of experts."""
    mixers: MixerDims = field(default_factory=MixerDims)
    """Widths of blocks without attention."""
    latent: LatentDims | None = None
    """Sizes of multi-head latent attention; None for keys and values of their own."""
    mtp_layers: int = 0
    """Modules behind the model that predict further tokens."""
    token_types: int = 0
    """Rows of the embedding of token types."""
    masked_head: bool = False
    """Whether the output layer is that of a masked language model."""
    binary_head: bool = False
    """With masked_head: whether there are a pooler and logits of the order of segments."""
    classes: int = 0
    """Logits of a classifier, in place of those of the vocabulary; 0 for a language model."""
    towers: int = 0
    """Encoders of a retrieval model: 1 for queries and passages, or 2; 0 for another model."""
    projection: int = 0
    """Width of the embeddings of a retrieval model behind a linear layer; 0 without one."""
    encoder_layers: int = 0
    """First blocks, which are an encoder; the others are its decoder. 0 for a model of one stack."""
    retro: RetroDims | None = None
    """Sizes of what reads retrieved neighbours; None for a model without retrieval."""
    low_rank: LowRank | None = None
    """LoRA adapters; everything else but what they name to be trained is frozen then."""
    prompt: int = 0
    """Vectors of a soft prompt; everything else is frozen then."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} key/value heads do not divide {self.num_attention_heads} heads")

    @property
    def tower_layers(self) -> int:
        """Layers of one stack of blocks with its embedding and its output layer."""
        return self.num_layers + 5

    @property
    def output_layers(self) -> tuple[int, ...]:
        """Index of the output layer of each encoder of a retrieval model, or of the model."""
        return tuple(self.tower_layers * tower - 1 for tower in range(1, max(self.towers, 1) + 1))

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions."""
        return self.max_position_embeddings + self.position_offset

    @classmethod
    def of(cls, model: Any, moe: Any = None, mixers: Any = None) -> ModelDims:
        """Reads objects with the configuration's keys as attributes.

        model: the model section. moe: the moe section; None for no experts. mixers: the mixers section, required for
        blocks without attention.
        """
        heads, retrieves = model.num_attention_heads, getattr(model, "lm_head", None) == RETRIEVAL_HEAD
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=heads,
            num_kv_heads=model.num_kv_heads or heads,
            head_dim=getattr(model, "kv_channels", None) or model.hidden_size // heads,
            mlp_width=model.mlp_width,
            gated=ACTIVATIONS.entry(model.activation).gated,
            learned=ACTIVATIONS.entry(model.activation).parameters,
            norm=model.norm,
            norm_bias=model.use_bias_in_norms,
            attention_bias=model.use_bias_in_attn_linear,
            mlp_bias=model.use_bias_in_mlp,
            pos_emb=model.pos_emb,
            max_position_embeddings=model.max_position_embeddings,
            position_offset=getattr(model, "opt_pos_emb_offset", 0),
            tied=not (model.no_weight_tying or retrieves or getattr(model, "num_classes", None)),
            qkv_bias=getattr(model, "add_qkv_bias", None),
            norm_placement=getattr(model, "norm_placement", "pre"),
            embedding_norm=getattr(model, "embedding_norm", False),
            qk_norm=model.use_qk_layernorm,
            qk_norm_across=getattr(model, "qk_layernorm_across_heads", False),
            output_gate=getattr(model, "attention_output_gate", False),
            value_residual=getattr(model, "value_residual", False),
            softmax_type=getattr(model, "softmax_type", VANILLA),
            rpe_buckets=model.rpe_num_buckets if "rpe_num_buckets" in POSITIONS.entry(model.pos_emb).settings else 0,
            gpt_j_residual=model.gpt_j_residual,
            gpt_j_tied=model.gpt_j_tied,
            kinds=tuple(getattr(model, "attention_config", None) or ()),
            mixture=MixtureDims() if moe is None else MixtureDims.of(moe),
            mixers=MixerDims() if mixers is None else MixerDims.of(model, mixers),
            latent=LatentDims.of(model),
            mtp_layers=getattr(model, "mtp_num_layers", None) or 0,
            token_types=getattr(model, "num_token_types", None) or 0,
            masked_head=getattr(model, "lm_head", None) == MASKED_HEAD,
            binary_head=bool(getattr(model, "bert_binary_head", None)),
            classes=getattr(model, "num_classes", None) or 0,
            towers=(1 if model.retrieval_shared_encoder else 2) if retrieves else 0,
            projection=(model.retrieval_projection_size or 0) if retrieves else 0,
            encoder_layers=getattr(model, "encoder_num_layers", None) or 0,
            retro=RetroDims.of(model),
            low_rank=low_rank(getattr(model, "lora", None)),
            prompt=prompt_length(getattr(model, "soft_prompt_tuning", None)),
        )

    def kind(self, block: int) -> str:
        """Returns the kind of a block by its name in attention_config."""
        return self.kinds[block] if self.kinds else "global"

    def has_experts(self, block: int) -> bool:
        """Returns whether a block has experts in place of one MLP."""
        return self.kind(block) not in WITHOUT_MLP and self.mixture.has_experts(block)

    def encodes(self, block: int) -> bool:
        """Returns whether a block is one of an encoder-decoder's encoder."""
        return block < self.encoder_layers

    def crosses(self, block: int) -> bool:
        """Returns whether a block attends to the output of an encoder, of its source or of neighbours."""
        return 0 < self.encoder_layers <= block or self.retrieves(block)

    def retrieves(self, block: int) -> bool:
        """Returns whether a block attends to retrieved neighbours."""
        return self.retro is not None and block in self.retro.blocks

    @property
    def relative_rows(self) -> int:
        """Rows of the relative positions of an encoder-decoder: the encoder's, then the decoder's."""
        return 2 * self.rpe_buckets

    @property
    def expert_width(self) -> int:
        """Inner width of an expert."""
        return self.mixture.width or self.mlp_width

    @property
    def frozen(self) -> bool:
        """Whether only adapters are trained, and what they name beside them."""
        return self.low_rank is not None or self.prompt > 0

    @property
    def trains_embedding(self) -> bool:
        """Whether the word embedding is trained."""
        return not self.frozen or self._saves(EMBEDDING)

    @property
    def trains_head(self) -> bool:
        """Whether the matrix of the output layer is trained."""
        return not self.frozen or self._saves(HEAD)

    def _saves(self, name: str) -> bool:
        return self.low_rank is not None and name in self.low_rank.trained(tied=self.tied)

    def saves_input(self, target: str) -> bool:
        """Returns whether the input of a matrix is saved for a weight gradient. target: a name of `lora`'s targets."""
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
    def value_size(self) -> int:
        """Width of all value heads together, the input of the attention's output projection."""
        return self.query_size if self.latent is None else self.num_attention_heads * self.latent.value

    @property
    def rotary_width(self) -> int:
        """Features of a head that rotary positions may rotate."""
        return self.head_dim if self.latent is None else self.latent.rotary

    def cached_per_token(self, tensor_ranks: int) -> int:
        """Returns the numbers that a rank's cache has for a token and a block with attention."""
        if self.latent is not None:
            return self.latent.cached
        return 2 * max(1, self.num_kv_heads // tensor_ranks) * self.head_dim

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key/value head, which changes the row order of the QKV weight."""
        return self.num_kv_heads != self.num_attention_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projections of queries, keys and values have biases."""
        return self.attention_bias if self.qkv_bias is None else self.qkv_bias

    @property
    def norms_before(self) -> bool:
        """Whether attention and MLP read the output of a norm."""
        return self.norm_placement in ("pre", "sandwich")

    @property
    def norms_after(self) -> bool:
        """Whether a norm changes what attention and MLP add to the residual, or the sum."""
        return self.norm_placement != "pre"

    @property
    def norms_sums(self) -> bool:
        """Whether the norms are on the residual with what was added; then none is behind the last block."""
        return self.norm_placement == "post"

    @property
    def shared_norm(self) -> bool:
        """Whether a block has one norm (gpt_j_tied) in place of two."""
        return self.gpt_j_residual and self.gpt_j_tied
