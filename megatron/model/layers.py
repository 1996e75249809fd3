"""The model as a list of layers, whose order is the checkpoint contract:

- 0 embedding
- 1 identity
- 2 .. L+1 blocks: attention and MLP or MoE, one of these alone, Mamba, Mamba-2, RWKV, gMLP
- L+2 identity
- L+3 final norm
- L+4 output layer, tied or with a matrix of its own; with further layers before it in a masked language model
- L+5 .. modules that predict further tokens, in training and as drafters; or of a model with two encoders all layers of
  the second

A LayerSpec only describes how to build its layer, so a pipeline stage builds its own layers and no others. Everything
that can be decided once (which norm, which kernel, which initialization) is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import nn

from megatron.adapter_config import LowRank
from megatron.block_sparsity import BlockLayout, layout_of
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.context_parallel.states import StatePassing
from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.partial_grads import mark_partial_grad
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.distributed.tensor_parallel.lora import LoraSpec
from megatron.kernels.activations import Activation
from megatron.kernels.attention_patterns import BlockPattern, MaskPattern, Window
from megatron.kernels.rotary import RotaryPair
from megatron.layer_types import options_of_blocks
from megatron.model.attention.cross import EncoderAttention
from megatron.model.attention.latent import LatentSelfAttention
from megatron.model.block import Block, TransformerBlock
from megatron.model.block_spec import BlockSpec
from megatron.model.class_head import ClassHead
from megatron.model.embedding import EmbeddingLayer
from megatron.model.encoder_decoder import (
    DecoderHead,
    DecoderNorm,
    DecoderTransformerBlock,
    EncoderDecoderEmbedding,
    EncoderTransformerBlock,
    TiedDecoderHead,
)
from megatron.model.head import FinalNorm, Head, Identity, TiedHead
from megatron.model.masked_head import MaskedHead
from megatron.model.mlp.activations import BoundedGate
from megatron.model.model_spec import ModelSpec
from megatron.model.moe.layer import MoEConfig
from megatron.model.moe.losses import RouterLossTracker
from megatron.model.moe.router import RouterOptions
from megatron.model.multi_token import FurtherToken
from megatron.model.norms.across_heads import AcrossHeadsNorm
from megatron.model.positions.base import AttentionPositions
from megatron.model.retrieval_head import RetrievalHead
from megatron.model.retro import RetroBlock
from megatron.model.value_residual import ValueResidualTransformerBlock
from megatron.param_table import FIRST_BLOCK, ModelDims
from megatron.registry import (
    ACTIVATIONS,
    ATTENDS,
    ATTENTION,
    ATTENTION_ALONE,
    FEEDS,
    INITS,
    MLPS,
    NORMS,
    ONE_PLUS,
    POSITIONS,
    ROUTERS,
    STANDALONE_BLOCK,
    WITHOUT_ATTENTION,
    load_target,
)


@dataclass(frozen=True)
class LayerSpec:
    """One layer, not yet built."""

    index: int
    """Index of the layer in the model and in checkpoints."""
    layer: type[nn.Module]
    """Class, built as layer(**arguments)."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class."""
    tied_to: int | None = None
    """Index of the layer whose weight it shares (output layer of a tied model: layer(embedding=that layer, ...))."""

    def build(self) -> nn.Module:
        """Builds the layer with its initial values."""
        return self.layer(**self.arguments)


def build_layer_specs(spec: ModelSpec) -> list[LayerSpec]:
    """Returns the layers of a model, in order."""
    second = spec.behind(spec.dims.tower_layers) if spec.dims.towers > 1 else None
    return _stack(spec) + ([] if second is None else _stack(second))


def _stack(spec: ModelSpec) -> list[LayerSpec]:
    """Returns the layers of one stack of blocks, from its embedding to its output layer."""
    blocks = _block_spec(spec)
    last = spec.dims.num_layers + 4
    layers = [
        LayerSpec(
            0, EncoderDecoderEmbedding if spec.dims.encoder_layers else EmbeddingLayer, {"spec": spec, "blocks": blocks}
        ),
        LayerSpec(1, Identity),
        *(
            LayerSpec(
                number + 2,
                _block(kind, spec.dims, number),
                {"number": number, "spec": blocks, "source": spec.param_factory(number + 2), **_dropouts(spec, number)},
            )
            for number, kind in enumerate(spec.dims.kinds)
        ),
        LayerSpec(last - 2, Identity),
        _final_norm(spec, blocks, last - 1),
        _output_layer(spec, blocks, last),
        *(_further_token(spec, blocks, last + depth) for depth in range(1, spec.dims.mtp_layers + 1)),
    ]
    return [replace(layer, index=layer.index + spec.first_layer) for layer in layers]


def _dropouts(spec: ModelSpec, number: int) -> dict[str, Any]:
    """Returns a further argument of a block that attends to neighbours: the dropouts of their encoder."""
    model = spec.model
    of_encoder = model.retro_encoder_hidden_dropout, model.retro_encoder_attention_dropout
    return {"dropouts": of_encoder} if spec.dims.retrieves(number) else {}


def _further_token(spec: ModelSpec, blocks: BlockSpec, index: int) -> LayerSpec:
    """Returns a module that predicts further tokens, with a block as the model's last one."""
    number = spec.dims.num_layers - 1
    given = {"block": _block(spec.dims.kind(number), spec.dims, number), "number": number}
    return LayerSpec(index, FurtherToken, {**given, "spec": blocks, "source": spec.param_factory(index)})


def _final_norm(spec: ModelSpec, blocks: BlockSpec, index: int) -> LayerSpec:
    given = {"norm": None if spec.dims.norms_sums else blocks.norm, "dtype": spec.dtype}
    if spec.dims.encoder_layers:
        return LayerSpec(index, DecoderNorm, {**given, "encoder_rows": blocks.encoder_rows})
    return LayerSpec(index, FinalNorm, given)


def _output_layer(spec: ModelSpec, blocks: BlockSpec, index: int) -> LayerSpec:
    if spec.dims.masked_head:
        return LayerSpec(index, MaskedHead, {"spec": spec, "blocks": blocks}, tied_to=0)
    if spec.dims.towers:
        return LayerSpec(index, RetrievalHead, {"spec": spec, "blocks": blocks})
    if spec.dims.classes:
        return LayerSpec(index, ClassHead, {"spec": spec, "blocks": blocks})
    two = spec.dims.encoder_layers > 0
    if spec.dims.tied:
        return LayerSpec(index, TiedDecoderHead if two else TiedHead, tied_to=0)
    return LayerSpec(index, DecoderHead if two else Head, {"spec": spec, "blocks": blocks})


def _block_spec(spec: ModelSpec) -> BlockSpec:
    """Resolves every named choice of the blocks, once."""
    model, initialization, dims, topology = spec.model, spec.initialization, spec.dims, spec.topology
    numbers = {
        "std": initialization.init_method_std,
        "num_layers": dims.num_layers,
        "hidden_size": spec.initial_width,
    }
    norm = NORMS.load(model.norm)
    epsilon = getattr(model, NORMS.entry(model.norm).epsilon)
    axis, positions = topology.model, POSITIONS.load(model.pos_emb)
    length = model.encoder_seq_length or 0 if dims.encoder_layers else 0
    kernels, entry = spec.kernels, NORMS.entry(model.norm)
    norm_kernel = None if entry.kernel is None else getattr(kernels, entry.kernel)

    def norm_of_shard(width: int) -> nn.Module:
        make = partial(norm, width, epsilon, dims.norm_bias)
        return _norm(make, axis, norm_kernel, partial_sum=axis.sequence_parallel)

    return BlockSpec(
        dims=dims,
        norm=partial(norm_of_shard, dims.hidden_size),
        norm_of=lambda width: norm(width, epsilon, dims.norm_bias),
        norm_of_shard=norm_of_shard,
        positions=_positions(model, dims.rotary_width, kernels.rotary),
        activation=_activation(model, kernels.activation),
        learned=load_target(learned) if (learned := ACTIVATIONS.entry(model.activation).module) else None,
        attention=tuple(_attention(dims, kind, block) for block, kind in enumerate(dims.kinds)),
        mlp=tuple(MLPS.load("moe" if dims.has_experts(block) else "dense") for block in range(dims.num_layers)),
        patterns=_patterns(model, dims.kinds),
        relative_positions=positions.for_scores(
            model, spec.param_factory(FIRST_BLOCK).of("attention.rpe"), spec.multipliers
        ),
        head_norm=_head_norm(dims, epsilon, axis, norm_kernel) if dims.qk_norm else None,
        init_fn=INITS.load(initialization.init_method)(**numbers),
        output_init_fn=INITS.load(initialization.output_layer_init_method)(**numbers),
        kernels=kernels,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        random=spec.rng,
        dtype=spec.dtype,
        reset_attention=spec.reset_attention,
        reset_positions=spec.reset_positions,
        encoder_length=length,
        encoder_rows=length // axis.size if axis.sequence_parallel else length,
        shards=SequenceShards.of(topology),
        states=StatePassing(topology.context),
        key_head=topology.key_head,
        moe_config=_moe_config(spec.moe, topology, spec.router_losses)
        if spec.moe and dims.mixture.experts > 1
        else None,
        multipliers=spec.multipliers,
        scales=spec.scales,
        lora_specs=_lora_specs(dims.low_rank, spec.rng),
    )


def _activation(model: ModelSection, kernel: Callable[[str, Activation], Activation]) -> Activation:
    """Returns the activation of MLPs and experts. kernel: (name, formula) -> the activation."""
    found = kernel(model.activation, ACTIVATIONS.load(model.activation))
    bound, offset = model.activation_func_clamp_value, model.glu_linear_offset
    if not ACTIVATIONS.entry(model.activation).gated or (bound is None and offset == 0.0):
        return found
    return BoundedGate(found, bound, offset)


def _moe_config(moe: MoeSection, topology: Topology, losses: RouterLossTracker | None) -> MoEConfig:
    """Returns what the blocks with experts share."""
    return MoEConfig(
        choose_experts=ROUTERS.load(moe.moe_router_type),
        jitter=moe.moe_jitter_eps,
        normalize=moe.moe_normalize_top_k,
        capacity=moe.moe_capacity_factor,
        eval_capacity=moe.moe_eval_capacity_factor,
        min_capacity=moe.moe_min_capacity,
        losses=losses or RouterLossTracker.of(moe),
        options=RouterOptions(
            sigmoid=moe.moe_router_score_function == "sigmoid",
            pre_softmax=moe.moe_router_pre_softmax,
            groups=moe.moe_router_num_groups or 1,
            group_topk=moe.moe_router_group_topk or 1,
            group_experts=moe.moe_router_group_experts,
        ),
        scaling=moe.moe_router_topk_scaling_factor,
        bias_rate=moe.moe_router_bias_update_rate,
        axis=topology.expert,
        batch=topology.dp_cp,
        context=topology.context,
    )


def _lora_specs(low_rank: LowRank | None, random: TensorParallelRNG) -> dict[str, LoraSpec]:
    """Returns the adapter of each targeted matrix, by the name of the target."""
    if low_rank is None:
        return {}
    one = LoraSpec(low_rank.rank, low_rank.scale, low_rank.dropout, random, low_rank.magnitudes)
    return dict.fromkeys(low_rank.targets, one)


def _attention(dims: ModelDims, kind: str, block: int) -> Callable[..., nn.Module]:
    """Returns the class of the attention or mixer of a block.

    Args:
        dims: sizes of the model.
        kind: kind of the block.
        block: its number.
    """
    if dims.encodes(block):
        return EncoderAttention
    if dims.latent is not None and kind not in WITHOUT_ATTENTION:
        return LatentSelfAttention
    attention: Callable[..., nn.Module] = ATTENTION.load("global" if kind == ATTENTION_ALONE else kind)
    return attention


def _block(kind: str, dims: ModelDims, number: int) -> type[Block]:
    """Returns the class of a block: the kind itself if it is a full block, else the block around it.

    Args:
        kind: kind of the block.
        dims: sizes of the model.
        number: of the block.
    """
    if dims.encoder_layers:
        return EncoderTransformerBlock if dims.encodes(number) else DecoderTransformerBlock
    if dims.retrieves(number):
        return RetroBlock
    if dims.value_residual:
        return ValueResidualTransformerBlock
    if ATTENTION.entry(kind).traits & (STANDALONE_BLOCK | ATTENDS | FEEDS):
        block: type[Block] = ATTENTION.load(kind)
        return block
    return TransformerBlock


def _patterns(model: ModelSection, kinds: Sequence[str]) -> tuple[Callable[[range], MaskPattern | None], ...]:
    """Returns the mask pattern of each block of the model, by heads."""
    options = options_of_blocks(model)
    made: dict[tuple[BlockLayout, range], BlockPattern] = {}  # blocks with one layout share its tables

    def of(number: int, kind: str) -> Callable[[range], MaskPattern | None]:
        layout = layout_of(kind, model.sparsity_config, number)
        if layout is None:
            width = options[number].sliding_window_width
            window = None if width is None else Window(width)
            return lambda heads: window
        return lambda heads: made.setdefault((layout, heads), BlockPattern(layout, heads))

    return tuple(of(number, kind) for number, kind in enumerate(kinds))


def _positions(model: ModelSection, head_dim: int, kernel: RotaryPair) -> tuple[AttentionPositions | None, ...]:
    """Returns what applies positions to queries and keys in each block; blocks with equal options share it."""
    scheme = POSITIONS.load(model.pos_emb)
    assert model.num_layers
    if not model.layer_types:
        return (scheme.for_attention(model, head_dim, kernel),) * model.num_layers
    made: list[tuple[tuple[Any, ...], AttentionPositions | None]] = []
    found = []
    for options in options_of_blocks(model):
        values = (options.rotary, options.rotary_emb_base, options.rope_scaling)
        known = [positions for same, positions in made if same == values]
        if not known:
            own = {"rotary_emb_base": options.rotary_emb_base, "rope_scaling": options.rope_scaling}
            section = SimpleNamespace(**{**vars(model), **own})
            known = [scheme.for_attention(section, head_dim, kernel) if options.rotary else None]
            made.append((values, known[0]))
        found.append(known[0])
    return tuple(found)


def _head_norm(dims: ModelDims, epsilon: float, axis: Axis, kernel: Any) -> Callable[[int], nn.Module]:
    """Returns what builds a norm of queries or keys, by the heads of all ranks: of each head, or of all together."""
    if dims.qk_norm_across:
        one_plus = NORMS.entry(dims.norm).traits >= ONE_PLUS
        return lambda heads: AcrossHeadsNorm(heads, dims.head_dim, epsilon, axis=axis, one_plus=one_plus)
    of_one = partial(NORMS.load(dims.norm), dims.head_dim, epsilon, dims.norm_bias)
    return lambda heads: _norm(of_one, axis, kernel, partial_sum=axis.size > 1)


def _norm(make: Callable[[], nn.Module], axis: Axis, kernel: Any, *, partial_sum: bool) -> nn.Module:
    """Builds a norm of the residual stream or of heads.

    Args:
        make: builds the module.
        axis: tensor-parallel ranks.
        kernel: the operation that its entry in the registry names, or None.
        partial_sum: true if a rank of the axis sees only a part of the input, so that gradients are summed over it.
    """
    norm = make()
    if kernel is not None:
        norm.compute = kernel
    if partial_sum:
        for parameter in norm.parameters():
            mark_partial_grad(parameter, axis)
    return norm
