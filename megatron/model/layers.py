"""The model as a list of layers, whose order is the checkpoint contract:

0 embedding, 1 empty, 2..L+1 the blocks, L+2 empty, L+3 final norm, L+4 output layer.

A LayerPlan only says how to build its layer, so a pipeline stage builds its own layers and no others. Everything that
can be decided once (which norm, which kernel, which initialisation) is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.adapter_config import LowRank, soft_prompt
from megatron.block_sparsity import BlockLayout, layout_of
from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.param_attrs import mark_partial_grad
from megatron.distributed.param_init import PaddedInit, ParamFactory
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.distributed.tensor_parallel.lora import Update
from megatron.kernels.attention_mask import Blocks, Pattern, Window
from megatron.kernels.dispatch import Kernels, choose_kernels
from megatron.model.block import Block, TransformerBlock
from megatron.model.block_spec import Parts
from megatron.model.embedding import EmbeddingLayer
from megatron.model.head import FinalNorm, Head, Identity, TiedHead
from megatron.model.init import rescaling
from megatron.model.moe.layer import MoEConfig
from megatron.model.moe.losses import RouterLossTracker
from megatron.param_table import FIRST_BLOCK, ModelDims, Multipliers, base_widths, growths
from megatron.registry import ACTIVATIONS, ATTENTION, INITS, MLPS, NORMS, POSITIONS, ROUTERS, WHOLE_BLOCK


@dataclass(frozen=True)
class LayerPlan:
    """One layer, not yet built.

    index: its place in the checkpoint. layer: the class, built as layer(**arguments). tied_to: index of the layer
    whose weight it shares (the output layer of a tied model: layer(embedding=that layer)), else None.
    """

    index: int
    layer: type[nn.Module]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tied_to: int | None = None

    def build(self) -> nn.Module:
        """The layer with its initial values."""
        return self.layer(**self.arguments)


def layer_plan(
    model: Any,
    initialization: Any,
    kernels: Any,
    *,
    padded_vocab_size: int,
    vocab_size: int | None = None,
    topology: Topology,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    random: TensorParallelRNG | None = None,
    recompute_attention: Callable[..., Tensor] | None = None,
    reset_attention: bool = False,
    reset_positions: bool = False,
    moe: Any = None,
    mixers: Any = None,
    mup: Any = None,
    losses: RouterLossTracker | None = None,
) -> list[LayerPlan]:
    """The layers of a model.

    model, initialization, kernels, moe, mixers, mup: the configuration's sections; without moe no block has experts,
    without mixers every block has attention, without mup it is an ordinary model. padded_vocab_size [tokens], of which
    vocab_size exist, all unless given. seed: of the run. dtype: of the parameters. device: where the model will run; a
    GPU where there is one, unless given. random: the generator for draws on tensors cut over ranks, kept by whoever
    saves its state; a new one unless given. recompute_attention: called as f(attention core, *inputs), repeats the core
    in the backward pass. reset_attention, reset_positions: whether tokens see their own document only, and positions
    start again with it, where the model is told where documents start. losses: of the routers, read by the engine that
    trains.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_kernels(device, dtype, kernels)
    if recompute_attention is not None:
        chosen = chosen.recomputed(recompute_attention)
    dims, base = ModelDims.of(model, moe, mixers), base_widths(mup)
    random = random or TensorParallelRNG(seed, topology.rank, device)
    rescale = None if base is None else rescaling(growths(dims, base), mup.mup_init_scale)

    def source(layer: int) -> ParamFactory:
        return ParamFactory(seed=seed, layer=layer, axis=topology.model, dtype=dtype, rescale=rescale)

    parts = replace(
        _parts(
            model,
            initialization,
            dims,
            chosen,
            random,
            topology,
            source(FIRST_BLOCK),
            Multipliers.of(mup, dims),
            dims.hidden_size if base is None else base.hidden_size,
        ),
        reset_attention=reset_attention,
        reset_positions=reset_positions,
        mixture=_mixture(moe, topology, losses) if dims.mixture.experts > 1 else None,
        updates=_updates(dims.low_rank, random),
    )
    last = dims.num_layers + 4
    table = {
        "vocab_size": padded_vocab_size,
        "hidden_size": dims.hidden_size,
        "fill": PaddedInit(parts.fill, vocab_size or padded_vocab_size),
        "kernel": chosen.linear,
    }
    embedding = {**table, **_embedding(model, parts), "source": source(0)}
    head = {**table, "source": source(last), "multiplier": parts.multipliers.output}
    blocks = [
        LayerPlan(number + 2, _block(kind), {"number": number, "parts": parts, "source": source(number + 2)})
        for number, kind in enumerate(model.attention_config)
    ]
    return [
        LayerPlan(0, EmbeddingLayer, embedding),
        LayerPlan(1, Identity),
        *blocks,
        LayerPlan(last - 2, Identity),
        LayerPlan(last - 1, FinalNorm, {"norm": parts.norm, "dtype": dtype}),
        LayerPlan(last, TiedHead, tied_to=0) if dims.tied else LayerPlan(last, Head, head),
    ]


def _embedding(model: Any, parts: Parts) -> dict[str, Any]:
    """What the embedding has that an output layer has not."""
    return {
        "position_fill": parts.fill,
        "positions": POSITIONS.load(model.pos_emb),
        "model": model,
        "dropout": parts.hidden_dropout,
        "reset_positions": parts.reset_positions,
        "tied": parts.dims.tied,
        "dtype": parts.dtype,
        "context": parts.context,
        "random": parts.random,
        "multiplier": parts.multipliers.embedding,
        "output_multiplier": parts.multipliers.output,
        "prompt": soft_prompt(getattr(model, "soft_prompt_tuning", None)),
    }


def _parts(
    model: Any,
    initialization: Any,
    dims: ModelDims,
    chosen: Kernels,
    random: TensorParallelRNG,
    topology: Topology,
    first_block: ParamFactory,
    multipliers: Multipliers,
    initial_width: int,
) -> Parts:
    """Look every named choice up, once.

    first_block: the source of what all blocks share. initial_width: the hidden size that initialisations speak of.
    """
    numbers = {"std": initialization.init_method_std, "num_layers": dims.num_layers, "hidden_size": initial_width}
    norm = NORMS.load(model.norm)
    epsilon = getattr(model, NORMS.entry(model.norm).epsilon)
    axis, positions = topology.model, POSITIONS.load(model.pos_emb)
    head_norm = partial(_norm, partial(norm, dims.head_dim, epsilon, dims.norm_bias), axis, partial_sum=axis.size > 1)
    return Parts(
        dims=dims,
        norm=partial(_norm, partial(norm, dims.hidden_size, epsilon, dims.norm_bias), axis, partial_sum=axis.sequence),
        norm_of=lambda width: norm(width, epsilon, dims.norm_bias),
        positions=positions.for_attention(model, dims.head_dim, chosen.rotary),
        activation=ACTIVATIONS.load(model.activation),
        attention=tuple(ATTENTION.load(kind) for kind in model.attention_config),
        mlp=tuple(MLPS.load("moe" if dims.has_experts(block) else "dense") for block in range(dims.num_layers)),
        patterns=_patterns(model),
        relative=positions.for_scores(model, first_block.of("attention.rpe"), multipliers),
        head_norm=head_norm if dims.qk_norm else None,
        fill=INITS.load(initialization.init_method)(**numbers),
        output_fill=INITS.load(initialization.output_layer_init_method)(**numbers),
        kernels=chosen,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        random=random,
        dtype=first_block.dtype,
        context=topology.context,
        multipliers=multipliers,
    )


def _mixture(moe: Any, topology: Topology, losses: RouterLossTracker | None) -> MoEConfig:
    """What the blocks with experts share."""
    return MoEConfig(
        choose=ROUTERS.load(moe.moe_router_type),
        jitter=moe.moe_jitter_eps,
        normalize=moe.moe_normalize_top_k,
        capacity=moe.moe_capacity_factor,
        eval_capacity=moe.moe_eval_capacity_factor,
        least=moe.moe_min_capacity,
        losses=losses or RouterLossTracker(moe.moe_aux_loss_coeff, moe.moe_z_loss_coeff),
        axis=topology.expert,
        batch=topology.gradient,
        context=topology.context,
    )


def _updates(asked: LowRank | None, random: TensorParallelRNG) -> dict[str, Update]:
    """The update of each targeted matrix, by the name of the target."""
    if asked is None:
        return {}
    return dict.fromkeys(asked.targets, Update(asked.rank, asked.scale, asked.dropout, random))


def _block(kind: str) -> type[Block]:
    """The class of a block: that of the kind where it is a whole block, else one that the kind is in."""
    if ATTENTION.entry(kind).traits & WHOLE_BLOCK:
        block: type[Block] = ATTENTION.load(kind)
        return block
    return TransformerBlock


def _patterns(model: Any) -> tuple[Callable[[range], Pattern | None], ...]:
    """What each block of the model hides from the heads of a core."""
    window = None if model.sliding_window_width is None else Window(model.sliding_window_width)
    made: dict[tuple[BlockLayout, range], Blocks] = {}  # blocks with one layout share its tables

    def of(number: int, kind: str) -> Callable[[range], Pattern | None]:
        layout = layout_of(kind, model.sparsity_config, number)
        if layout is None:
            return lambda heads: window
        return lambda heads: made.setdefault((layout, heads), Blocks(layout, heads))

    return tuple(of(number, kind) for number, kind in enumerate(model.attention_config))


def _norm(make: Callable[[], nn.Module], axis: Axis, *, partial_sum: bool) -> nn.Module:
    """A norm of the residual stream, or of heads. partial_sum: whether a rank of the axis sees a part of either."""
    norm = make()
    if partial_sum:
        for parameter in norm.parameters():
            mark_partial_grad(parameter, axis)
    return norm
