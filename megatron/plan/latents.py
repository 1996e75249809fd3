"""Saved activations of multi-head latent attention without its core, and of the core by kernels that save no scores.

The counts follow from the operations of megatron/model/attention/latent.py; tests/plan/test_activations.py compares
them with autograd.
"""

from __future__ import annotations

from megatron.param_table import LatentDims

FP32 = 4


def latent_bytes(latent: LatentDims, width: int) -> int:
    """Returns the bytes of a token on every rank: inputs and outputs of the norms of latents.

    Args:
        latent: sizes.
        width: bytes of an activation.
    """
    queries = 2 * latent.query_rank * width + (2 * FP32 if latent.query_rank else 0)
    return queries + (latent.cached + latent.rank) * width + 2 * FP32


def core_bytes(latent: LatentDims, width: int, *, selective: bool) -> int:
    """Returns the bytes of a token and head: queries, keys and values of one width, the core's output, and what is left
    of it where values are narrower.

    Args:
        latent: sizes.
        width: bytes of an activation.
        selective: whether the core is recomputed, so that its output is not saved beside the input of the projection.
    """
    filled = latent.value < latent.core
    values = latent.core if filled else latent.plain + latent.value  # a part of the projection's output
    if selective:
        return (2 * latent.core + values + latent.value) * width
    output = latent.core + (latent.value if filled else 0)
    return (2 * latent.core + values + output) * width + FP32
