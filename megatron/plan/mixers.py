"""What the plain kernels of blocks without attention keep of a micro batch, besides their norms [bytes].

The counts of features follow from the operations of megatron/model/mixers and megatron/kernels/{scan,wkv}.py, and were
held against what autograd keeps (tests/plan/test_activations.py). Fused Mamba kernels keep much less: they repeat the
scan in the backward pass.

s sequence, b micro batch, h hidden, d channels, f features of a half, t tensor parallel degree.
"""

from __future__ import annotations

from megatron.param_table import ModelDims

FP32 = 4
CHUNK = 16
"""Positions of a chunk of RWKV's linear attention."""


def kept_by_mixer(
    dims: ModelDims, kind: str, *, tokens: int, seq_length: int, micro_batch: int, cut: int, width: int, fused: bool
) -> int:
    """Bytes of a block of this kind. cut: tensor parallel degree. width: of an activation [bytes]. fused: the scan."""
    if kind == "mamba":
        return tokens * _mamba(dims, seq_length, cut, width, fused=fused)
    if kind == "rwkv":
        return tokens * _rwkv(dims, cut, width)
    return tokens * _gmlp(dims, cut, width) + _positions(dims, kind, seq_length, micro_batch, tokens, width)


def _mamba(dims: ModelDims, seq_length: int, cut: int, width: int, *, fused: bool) -> int:
    """Of a token: halves, convolution, step and gate, then two states for each round of the scan's doubling."""
    channels = dims.mixers.mamba_inner // cut
    rounds = (seq_length - 1).bit_length()
    states = 0 if fused else (2 * rounds + 1) * dims.mixers.mamba_state * FP32
    return channels * (6 * width + 22 + states)


def _rwkv(dims: ModelDims, cut: int, width: int) -> int:
    """Of a token: what is mixed before products that are cut, what comes after, and the fading inside a chunk."""
    return 22 * dims.hidden_size * width + dims.mixers.rwkv_attention // cut * (14 * width + (2 * CHUNK + 13) * FP32)


def _gmlp(dims: ModelDims, cut: int, width: int) -> int:
    """Of a token: both halves before and after the activation, the normed half, the mixed one and the product."""
    return (6 * dims.mixers.gmlp_width // cut + dims.mixers.gmlp_width) * width


def _positions(dims: ModelDims, kind: str, seq_length: int, micro_batch: int, tokens: int, width: int) -> int:
    """The masked matrix of positions with its mask, and the small attention."""
    kept = seq_length**2 * (width + 1)
    if kind == "amlp":
        kept += micro_batch * seq_length**2 * (FP32 + (width if width < FP32 else 0))
        kept += 8 * tokens * dims.mixers.gmlp_attention * width
    return kept
