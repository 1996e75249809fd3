"""Tensors of Mamba, Mamba-2, RWKV, gMLP and aMLP blocks and of gated delta nets, and shapes of their recurrent state.

Names and shapes are those of the public layout (gMLP's small attention aside, which there reads another tensor).
"""

from __future__ import annotations

from megatron.param_table.dims import ModelDims
from megatron.param_table.parts import column, norm, row
from megatron.param_table.tensor import TensorShape
from megatron.registry import GATED_DELTA_NET

RWKV_MIX_RANK = 32
"""Rank of the corrections of RWKV's five interpolations."""

RWKV_DECAY_RANK = 64
"""Rank of the correction of RWKV's decay."""


def mamba_block(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of a norm and a Mamba mixer, whose channels are sharded."""
    layer, mixers, hidden = block + 2, dims.mixers, dims.hidden_size
    inner, state, rank, bias = mixers.mamba_inner, mixers.mamba_state, mixers.mamba_rank, mixers.mamba_linear_bias
    table = norm(dims, layer, "norm")
    table.append(TensorShape(layer, "mixer.A_log", (inner, state), 0, "mixing"))
    table.append(TensorShape(layer, "mixer.D", (inner,), 0, "mixing"))
    table += column(layer, "mixer.in_proj", 2 * inner, hidden, bias, (inner, inner))
    table.append(TensorShape(layer, "mixer.conv1d.weight", (inner, 1, mixers.mamba_convolution), 0, "mixing"))
    if mixers.mamba_conv_bias:
        table.append(TensorShape(layer, "mixer.conv1d.bias", (inner,), 0, "bias"))
    table += row(layer, "mixer.x_proj", rank + 2 * state, inner, bias)
    table += column(layer, "mixer.dt_proj", inner, rank, True)
    return table + row(layer, "mixer.out_proj", hidden, inner, bias)


def mamba2_block(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of a norm and a Mamba-2 mixer, whose heads and groups are sharded."""
    layer, mixers, hidden = block + 2, dims.mixers, dims.hidden_size
    sizes, bias = mixers.mamba2, mixers.mamba_linear_bias
    channels, width = sum(sizes.mixed), mixers.mamba_convolution
    sections = (sizes.inner, *sizes.mixed, sizes.heads)
    table = norm(dims, layer, "norm")
    table += [TensorShape(layer, f"mixer.{name}", (sizes.heads,), 0, "mixing") for name in ("A_log", "D", "dt_bias")]
    table += column(layer, "mixer.in_proj", sum(sections), hidden, bias, sections)
    table.append(TensorShape(layer, "mixer.conv1d.weight", (channels, 1, width), 0, "mixing", sizes.mixed))
    if mixers.mamba_conv_bias:
        table.append(TensorShape(layer, "mixer.conv1d.bias", (channels,), 0, "bias", sizes.mixed))
    table.append(TensorShape(layer, "mixer.norm.weight", (sizes.inner,), 0, "norm"))
    return table + row(layer, "mixer.out_proj", hidden, sizes.inner, bias)


def gated_delta_net(dims: ModelDims, layer: int) -> list[TensorShape]:
    """Returns the tensors of a gated delta net, whose heads are sharded. layer: its index."""
    sizes, hidden, name = dims.mixers.delta, dims.hidden_size, "attention"
    table = [TensorShape(layer, f"{name}.{part}", (sizes.value_heads,), 0, "mixing") for part in ("A_log", "dt_bias")]
    table += column(layer, f"{name}.in_proj", sum(sizes.projected), hidden, False, sizes.projected)
    convolution = (sum(sizes.mixed), 1, sizes.convolution)
    table.append(TensorShape(layer, f"{name}.conv1d.weight", convolution, 0, "mixing", sizes.mixed))
    table.append(TensorShape(layer, f"{name}.norm.scale", (sizes.value,), None, "norm"))
    return table + row(layer, f"{name}.dense", hidden, sizes.value_size, False)


def rwkv_block(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of time mixing and channel mixing, a norm before each; heads and inner width are sharded."""
    return (
        _rwkv_norm(dims, block, "ln1")
        + _time_mixing(dims, block)
        + _rwkv_norm(dims, block, "ln2")
        + _channel(dims, block)
    )


def _rwkv_norm(dims: ModelDims, block: int, name: str) -> list[TensorShape]:
    """Returns the tensors of a layernorm with a bias."""
    shape = (dims.hidden_size,)
    return [TensorShape(block + 2, f"{name}.{kind}", shape, None, "norm") for kind in ("weight", "bias")]


def _time_mixing(dims: ModelDims, block: int) -> list[TensorShape]:
    layer, hidden, width, head = block + 2, dims.hidden_size, dims.mixers.rwkv_attention, dims.mixers.rwkv_head

    def mixing(name: str, shape: tuple[int, ...], dim: int | None = None) -> TensorShape:
        return TensorShape(layer, f"att.{name}", shape, dim, "mixing")

    table = [mixing(f"time_maa_{part}", (1, 1, hidden)) for part in "xwkvrg"]
    table += [
        TensorShape(layer, "att.time_maa_w1", (hidden, 5 * RWKV_MIX_RANK), None, "weight", inputs=0),
        TensorShape(layer, "att.time_maa_w2", (5, RWKV_MIX_RANK, hidden), None, "weight", inputs=1),
        mixing("time_decay", (1, 1, width), 2),
        TensorShape(layer, "att.time_decay_w1", (hidden, RWKV_DECAY_RANK), None, "weight", inputs=0),
        TensorShape(layer, "att.time_decay_w2", (RWKV_DECAY_RANK, width), 1, "weight", inputs=0),
        mixing("time_faaaa", (width // head, head), 0),
    ]
    for name in ("receptance", "key", "value"):
        table += column(layer, f"att.{name}", width, hidden, False)
    table += row(layer, "att.output", hidden, width, False)
    table += column(layer, "att.gate", width, hidden, False)
    return [*table, *(TensorShape(layer, f"att.ln_x.{kind}", (width,), 0, "norm") for kind in ("weight", "bias"))]


def _channel(dims: ModelDims, block: int) -> list[TensorShape]:
    layer, hidden, width = block + 2, dims.hidden_size, dims.mixers.rwkv_ffn
    table = [TensorShape(layer, f"ffn.time_maa_{part}", (1, 1, hidden), None, "mixing") for part in "kr"]
    table += column(layer, "ffn.key", width, hidden, False)
    table += column(layer, "ffn.receptance", hidden, hidden, False)
    return table + row(layer, "ffn.value", hidden, width, False)


def gmlp_block(dims: ModelDims, block: int) -> list[TensorShape]:
    """Returns the tensors of a norm, an MLP with a gate over positions, and for amlp a small attention."""
    layer, hidden, width, positions = block + 2, dims.hidden_size, dims.mixers.gmlp_width, dims.mixers.gmlp_positions
    table = norm(dims, layer, "norm")
    table += column(layer, "input_linear", 2 * width, hidden, True, (width, width))
    table += norm(dims, layer, "sgu.norm", width)
    table.append(TensorShape(layer, "sgu.proj.weight", (positions, positions), None, "spatial"))
    table.append(TensorShape(layer, "sgu.proj.bias", (positions,), None, "mixing"))
    if dims.kind(block) == "amlp":
        small = dims.mixers.gmlp_attention
        table.append(TensorShape(layer, "sgu.attn.proj_qkv.weight", (3 * small, hidden), None, "weight"))
        table.append(TensorShape(layer, "sgu.attn.proj_qkv.bias", (3 * small,), None, "bias"))
        table += column(layer, "sgu.attn.proj_ffn", width, small, True)
    return table + row(layer, "output_linear", hidden, width, True)


def recurrent_state_shapes(
    dims: ModelDims, block: int, *, model_size: int, max_length: int
) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of a block's recurrent state for one sequence on a rank; {} for attention.

    Args:
        dims: of the model.
        block: its number.
        model_size: tensor parallel degree.
        max_length: of the sequence [tokens].
    """
    mixers, hidden = dims.mixers, dims.hidden_size
    kind = dims.kind(block)
    if kind == "mamba":
        channels = mixers.mamba_inner // model_size
        return {"convolution": (mixers.mamba_convolution - 1, channels), "state": (channels, mixers.mamba_state)}
    if kind == "mamba2":
        sizes = mixers.mamba2
        return {
            "convolution": (mixers.mamba_convolution - 1, sum(sizes.mixed) // model_size),
            "state": (sizes.heads // model_size, sizes.head, sizes.state),
        }
    if kind == GATED_DELTA_NET:
        delta = mixers.delta
        channels, heads = sum(delta.mixed) // model_size, delta.value_heads // model_size
        return {"convolution": (delta.convolution - 1, channels), "state": (heads, delta.key, delta.value)}
    if kind == "rwkv":
        heads = mixers.rwkv_attention // mixers.rwkv_head // model_size
        state = (heads, mixers.rwkv_head, mixers.rwkv_head)
        return {"time": (hidden,), "channel": (hidden,), "state": state}
    if kind in {"gmlp", "amlp"}:
        small = (max_length, mixers.gmlp_attention)
        shapes: dict[str, tuple[int, ...]] = {"gate": (max_length, mixers.gmlp_width // model_size)}
        return shapes | ({"keys": small, "values": small} if kind == "amlp" else {})
    return {}
