"""Saved activations of blocks without attention, by the plain kernels, without their norms [bytes].

The counts of features follow from the operations of megatron/model/mixers and megatron/kernels/{scan,wkv}.py, and
tests/plan/test_activations.py compares them with autograd. Fused Mamba kernels save much less: they repeat the scan in
the backward pass.

s sequence, b micro batch, h hidden, d channels, f features of a half, t tensor parallel degree.
"""

from __future__ import annotations

from megatron.param_table import ModelDims

FP32 = 4
CHUNK = 16
"""Positions of a chunk of RWKV's linear attention."""


def mixer_activations(
    dims: ModelDims, kind: str, *, tokens: int, seq_length: int, micro_batch: int, tp: int, width: int, fused: bool
) -> int:
    """Returns the saved bytes of a block and a micro batch.

    Args:
        dims: of the model.
        kind: mamba, mamba2, rwkv, gmlp or amlp.
        tokens: of the micro batch.
        seq_length: [tokens].
        micro_batch: [samples].
        tp: tensor parallel degree.
        width: bytes of an activation.
        fused: whether the scan is fused.
    """
    if kind == "mamba":
        return tokens * _mamba(dims, seq_length, tp, width, fused=fused)
    if kind == "mamba2":
        return tokens * _mamba2(dims, tp, width)
    if kind == "rwkv":
        return tokens * _rwkv(dims, tp, width)
    return tokens * _gmlp(dims, tp, width) + _positions(dims, kind, seq_length, micro_batch, tokens, width)


def _mamba(dims: ModelDims, seq_length: int, tp: int, width: int, *, fused: bool) -> int:
    """Returns the bytes of a token: halves, convolution, step and gate, and two states per round of the scan."""
    channels = dims.mixers.mamba_inner // tp
    rounds = (seq_length - 1).bit_length()
    states = 0 if fused else (2 * rounds + 1) * dims.mixers.mamba_state * FP32
    return channels * (6 * width + 22 + states)


def _mamba2(dims: ModelDims, tp: int, width: int) -> int:
    """Returns the bytes of a token: the projection, the convolution's two and the state space's inputs in fp32, the
    steps, and the norm and gate in fp32.
    """
    sizes = dims.mixers.mamba2
    inner, channels, heads = sizes.inner // tp, sum(sizes.mixed) // tp, sizes.heads // tp
    if width == FP32:  # the gate keeps the whole projection
        return (6 * inner + 4 * channels + 4 * heads) * FP32
    return (inner + 2 * channels) * width + (5 * inner + channels + 3 * heads) * FP32


def _rwkv(dims: ModelDims, tp: int, width: int) -> int:
    """Returns the bytes of a token: inputs of sharded products, their outputs, and the decay inside a chunk."""
    return 22 * dims.hidden_size * width + dims.mixers.rwkv_attention // tp * (14 * width + (2 * CHUNK + 13) * FP32)


def _gmlp(dims: ModelDims, tp: int, width: int) -> int:
    """Returns the bytes of a token: both halves before and after the activation, the norm, the gate, the product."""
    return (6 * dims.mixers.gmlp_width // tp + dims.mixers.gmlp_width) * width


def _positions(dims: ModelDims, kind: str, seq_length: int, micro_batch: int, tokens: int, width: int) -> int:
    """Returns the bytes of the masked matrix of positions with its mask, and of the small attention."""
    saved = seq_length**2 * (width + 1)
    if kind == "amlp":
        saved += micro_batch * seq_length**2 * (FP32 + (width if width < FP32 else 0))
        saved += 8 * tokens * dims.mixers.gmlp_attention * width
    return saved
