"""Tensors of a block, by its kind in `attention_config` and whether it has experts."""

from __future__ import annotations

from megatron.param_table.adapters import with_lora
from megatron.param_table.dims import ModelDims
from megatron.param_table.mixers import gmlp_block, mamba_block, rwkv_block
from megatron.param_table.parts import FIRST_BLOCK, SHARED, column, norm, positions, row
from megatron.param_table.tensor import TensorShape
from megatron.registry import POSITIONS


def block_tensors(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of block ``block`` (from 0), which is layer ``block + 2``."""
    return with_lora(BLOCKS.get(dims.kind(block), attention_block)(dims, block), dims.low_rank)


def attention_block(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of attention and MLP. Attention kinds differ in their masks, not in their tensors."""
    layer = block + 2
    query, kv = dims.query_size, dims.kv_size
    sections = (query, kv, kv) if dims.grouped else ()
    table = norm(dims, layer, "input_layernorm")
    table += column(layer, "attention.query_key_value", query + 2 * kv, dims.hidden_size, dims.attention_bias, sections)
    if dims.qk_norm:
        table += norm(dims, layer, "attention.q_layernorm", dims.head_dim)
        table += norm(dims, layer, "attention.k_layernorm", dims.head_dim)
    if layer == FIRST_BLOCK:
        table += positions(dims, layer, SHARED, POSITIONS.entry(dims.pos_emb).scores)
    table += row(layer, "attention.dense", dims.hidden_size, query, dims.attention_bias)
    if not dims.shared_norm:
        table += norm(dims, layer, "post_attention_layernorm")
    return table + (experts(dims, layer) if dims.has_experts(block) else mlp(dims, layer))


def mlp(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of an MLP."""
    width = dims.mlp_width
    sections = (width, width) if dims.gated else ()
    table = column(layer, "mlp.linear1", sum(sections) or width, dims.hidden_size, dims.mlp_bias, sections)
    return table + row(layer, "mlp.linear2", dims.hidden_size, width, dims.mlp_bias)


def experts(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of a router and a stack of expert MLPs; every expert is sharded along its width.

    w1 feeds the activation, w3 is the plain half of a gated activation. Both are [out, in] for each expert; w2 is
    [in, out], as in the public layout. Experts have no biases.
    """
    count, width, hidden = dims.mixture.experts, dims.mlp_width, dims.hidden_size
    table = [TensorShape(layer, "mlp.router.layer.weight", (count, hidden), None, "weight")]
    for name in ("w1", "w3", "w2") if dims.gated else ("w1", "w2"):
        shape = (count * width, hidden)
        inputs = 0 if name == "w2" else 1
        table.append(TensorShape(layer, f"mlp.experts.mlp.{name}", shape, 0, "expert", (width,) * count, inputs))
    return table


BLOCKS = {"mamba": mamba_block, "rwkv": rwkv_block, "gmlp": gmlp_block, "amlp": gmlp_block}
"""Kinds without attention -> their tensors."""
