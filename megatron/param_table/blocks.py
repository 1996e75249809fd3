"""Tensors of a block, by its kind in `attention_config` and whether it has experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron.param_table.adapters import EXPERT_STACKS, with_lora
from megatron.param_table.dims import LatentDims, ModelDims
from megatron.param_table.mixers import gated_delta_net, gmlp_block, mamba2_block, mamba_block, rwkv_block
from megatron.param_table.parts import FIRST_BLOCK, SHARED, column, norm, positions, replicated, row
from megatron.param_table.tensor import TensorShape
from megatron.registry import ATTENTION_ALONE, GATED_DELTA_NET, LEARNABLE, MLP_ALONE, POSITIONS


def block_tensors(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of block ``block`` (from 0), which is layer ``block + 2``."""
    return with_lora(BLOCKS.get(dims.kind(block), attention_block)(dims, block), dims.low_rank)


def further_token(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of a module that predicts further tokens: norms, a projection, a block as the last one."""
    table = norm(dims, layer, "enorm") + norm(dims, layer, "hnorm")
    table += replicated(layer, "eh_proj", dims.hidden_size, 2 * dims.hidden_size, False)
    block = block_tensors(dims, dims.num_layers - 1)
    table += [replace(shape, layer=layer, name=f"block.{shape.name}") for shape in block if SHARED not in shape.name]
    return table + norm(dims, layer, "norm")


def attention_block(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of attention, or of what is in its place, and MLP."""
    layer = block + 2
    table = norm(dims, layer, "input_layernorm") if dims.norms_before else []
    table += gated_delta_net(dims, layer) if dims.kind(block) == GATED_DELTA_NET else attention(dims, layer)
    if dims.norms_after:
        table += norm(dims, layer, "attention_output_layernorm")
    if dims.crosses(block):
        table += cross_attention(dims, layer)
    if dims.norms_before and not dims.shared_norm:
        table += norm(dims, layer, "post_attention_layernorm")
    if dims.norms_after:
        table += norm(dims, layer, "mlp_output_layernorm")
    if block == dims.encoder_layers - 1:
        table += norm(dims, layer, "encoder_layernorm")
    table += mlp_or_experts(dims, block)
    return table + (neighbor_encoder(dims, layer) if _has_encoder(dims, block) else [])


def _has_encoder(dims: ModelDims, block: int) -> bool:
    return dims.retro is not None and block == dims.retro.blocks[0]


ENCODER = "retro_encoder."
"""Before the names of the tensors of an encoder of neighbours."""


def retrieval_tensors(table: Sequence[TensorShape]) -> set[str]:
    """Returns the keys of what a model with retrieval has beside a language model. table: every tensor of a model."""
    if not any(shape.name.startswith(ENCODER) for shape in table):
        return set()
    return {shape.key for shape in table if shape.name.startswith((ENCODER, "cross_attention"))}


def neighbor_encoder(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of the encoder of neighbours, whose first block also attends to a chunk of the text."""
    assert dims.retro is not None
    table = []
    for number in range(dims.retro.encoder_layers):
        block = norm(dims, layer, "input_layernorm") + projections(dims, layer)
        block += row(layer, "attention.dense", dims.hidden_size, dims.value_size, dims.attention_bias)
        if number == 0:
            block += cross_attention(dims, layer)
        block += norm(dims, layer, "post_attention_layernorm") + dense_mlp(dims, layer)
        table += [replace(shape, name=f"{ENCODER}{number}.{shape.name}") for shape in block]
    return table


def attention_alone(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of a norm and attention."""
    return norm(dims, block + 2, "input_layernorm") + attention(dims, block + 2)


def mlp_alone(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of a norm and an MLP or experts."""
    return norm(dims, block + 2, "input_layernorm") + mlp_or_experts(dims, block)


def mlp_or_experts(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of the MLP of a block, or of its experts."""
    layer = block + 2
    if dims.has_experts(block):
        return experts(dims, layer) + shared_experts(dims, layer)
    return dense_mlp(dims, layer)


def dense_mlp(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of the MLP of a block without experts, and of its activation."""
    learned = [TensorShape(layer, f"mlp.activation.{name}", (1,), None, "bias") for name in dims.learned]
    return mlp(dims, layer, "mlp", dims.mlp_width, dims.mlp_bias) + learned


def attention(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of attention. Its kinds differ in their masks, not in their tensors."""
    table = projections(dims, layer) if dims.latent is None else latent_projections(dims, dims.latent, layer)
    if dims.softmax_type == LEARNABLE:
        table.append(TensorShape(layer, "attention.sinks", (dims.num_attention_heads,), 0, "bias"))
    if dims.value_residual and layer > FIRST_BLOCK:
        table.append(TensorShape(layer, "attention.value_residual.factors", (2,), None, "bias"))
    if layer == FIRST_BLOCK:
        table += positions(dims, layer, SHARED, POSITIONS.entry(dims.pos_emb).scores)
    return table + row(layer, "attention.dense", dims.hidden_size, dims.value_size, dims.attention_bias)


def projections(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the joint projection of queries, keys and values, the norms of queries and keys, and the output gate."""
    query, kv = dims.query_size, dims.kv_size
    sections = (query, kv, kv) if dims.grouped else ()
    table = column(layer, "attention.query_key_value", query + 2 * kv, dims.hidden_size, dims.has_qkv_bias, sections)
    if dims.qk_norm:
        widths, cut = ((query, kv), 0) if dims.qk_norm_across else ((dims.head_dim, dims.head_dim), None)
        table += norm(dims, layer, "attention.q_layernorm", widths[0], cut)
        table += norm(dims, layer, "attention.k_layernorm", widths[1], cut)
    if dims.output_gate:
        table += column(layer, "attention.output_gate", query, dims.hidden_size, dims.has_qkv_bias)
    return table


def latent_projections(dims: ModelDims, latent: LatentDims, layer: int) -> list[TensorShape]:
    """Returns the projections to and from the latents of a token, and the norms of the latents."""
    heads, hidden, bias = dims.num_attention_heads, dims.hidden_size, dims.has_qkv_bias
    if latent.query_rank:
        table = replicated(layer, "attention.q_down_proj", latent.query_rank, hidden, bias)
        table += norm(dims, layer, "attention.q_layernorm", latent.query_rank)
        table += column(layer, "attention.q_up_proj", heads * latent.query_head, latent.query_rank, False)
    else:
        table = column(layer, "attention.q_proj", heads * latent.query_head, hidden, False)
    table += replicated(layer, "attention.kv_down_proj", latent.cached, hidden, bias)
    table += norm(dims, layer, "attention.kv_layernorm", latent.rank)
    return table + column(layer, "attention.kv_up_proj", heads * (latent.plain + latent.value), latent.rank, False)


def cross_attention(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of attention to an encoder's output, and of the norm before it; keys and values are rows
    head by head, [k, v].
    """
    query, hidden, name = dims.query_size, dims.hidden_size, "cross_attention"
    table = norm(dims, layer, "cross_attention_layernorm")
    table += column(layer, f"{name}.query", query, hidden, dims.has_qkv_bias)
    table += column(layer, f"{name}.key_value", 2 * dims.kv_size, hidden, dims.has_qkv_bias)
    return table + row(layer, f"{name}.dense", hidden, query, dims.attention_bias)


def mlp(dims: ModelDims, layer: int, name: str, width: int, bias: bool) -> list[TensorShape]:
    """Returns the tensors of an MLP.

    Args:
        dims: of the model.
        layer: layer index.
        name: of the MLP in its layer.
        width: inner width.
        bias: whether its projections have biases.
    """
    sections = (width, width) if dims.gated else ()
    table = column(layer, f"{name}.linear1", sum(sections) or width, dims.hidden_size, bias, sections)
    return table + row(layer, f"{name}.linear2", dims.hidden_size, width, bias)


def experts(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of a router and a stack of expert MLPs; every expert is sharded along its width.

    w1 feeds the activation, w3 is the plain half of a gated activation. Both are [out, in] for each expert; w2 is
    [in, out], as in the public layout. b1, b3 and b2 are their biases, expert after expert.
    """
    mixture, width, hidden = dims.mixture, dims.expert_width, dims.hidden_size
    count = mixture.experts
    table = [TensorShape(layer, "mlp.router.layer.weight", (count, hidden), None, "weight")]
    if mixture.router_bias:
        table.append(TensorShape(layer, "mlp.router.layer.bias", (count,), None, "bias"))
    if mixture.correction_bias:
        table.append(TensorShape(layer, "mlp.router.e_score_correction_bias", (count,), None, "buffer"))
    for name in ("w1", "w3", "w2") if dims.gated else ("w1", "w2"):
        shape = (count * width, hidden)
        inputs = 0 if name == "w2" else 1
        table.append(TensorShape(layer, f"{EXPERT_STACKS}{name}", shape, 0, "expert", (width,) * count, inputs))
        if mixture.bias:
            features, cut = (hidden, None) if name == "w2" else (width, 0)
            of_all, sections = (count * features,), () if cut is None else (width,) * count
            table.append(TensorShape(layer, f"{EXPERT_STACKS}b{name[1]}", of_all, cut, "expert_bias", sections))
    return table


def shared_experts(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of the experts that every token goes through, and of their gate."""
    mixture, name = dims.mixture, "mlp.shared_experts"
    if not mixture.shared_width:
        return []
    table = mlp(dims, layer, name, mixture.shared_width, bias=False)
    if mixture.shared_gate:
        table.append(TensorShape(layer, f"{name}.gate.weight", (1, dims.hidden_size), None, "weight"))
    return table


BLOCKS = {
    "mamba": mamba_block,
    "mamba2": mamba2_block,
    "rwkv": rwkv_block,
    "gmlp": gmlp_block,
    "amlp": gmlp_block,
    ATTENTION_ALONE: attention_alone,
    MLP_ALONE: mlp_alone,
}
"""Kinds that are no attention and MLP -> their tensors."""
