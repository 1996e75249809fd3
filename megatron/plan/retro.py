"""FLOPs and activations of a model that attends to retrieved neighbours.

The decoder's weights multiply the tokens of the text, those of the encoder the tokens of all neighbours. The matrix of
keys and values of cross attention multiplies what is read: in the decoder the neighbours, in the encoder the text.
FLOPs are counted as in flops.py.

s tokens of the text, e tokens of all its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron.param_table import ModelDims, RetroDims, TensorShape
from megatron.plan.activation_layout import ActivationLayout
from megatron.plan.encoder_decoder import cross_activations
from megatron.plan.flops import flops_per_iteration
from megatron.plan.memory import block_activations

ENCODER, KEYS = "retro_encoder.", "cross_attention.key_value"


def retro_flops(dims: ModelDims, table: Sequence[TensorShape], *, seq_length: int, train_batch_size: int) -> int:
    """Returns the FLOPs of forward and backward over the global batch.

    Args:
        dims: of the model.
        table: every tensor of the model.
        seq_length: s [tokens].
        train_batch_size: [samples].
    """
    assert dims.retro is not None
    read = dims.retro.neighbor_length(seq_length)
    more = [tensor for tensor in table if tensor.name.startswith((ENCODER, KEYS))]
    own = [tensor for tensor in table if tensor not in more]
    plain = flops_per_iteration(
        replace(dims, retro=None), own, seq_length=seq_length, train_batch_size=train_batch_size
    )
    products = 0
    for tensor in more:
        if tensor.kind == "weight":
            of_text = tensor.name.startswith(ENCODER) and KEYS in tensor.name
            products += tensor.count * (seq_length if of_text else read)
    return plain + 3 * (2 * products + 4 * _scores(dims.retro, seq_length, read) * dims.query_size) * train_batch_size


def _scores(sizes: RetroDims, seq_length: int, read: int) -> int:
    """Returns the pairs of queries and keys: of text and neighbours, in neighbours, and of neighbours and chunks."""
    of_text = len(sizes.blocks) * seq_length * sizes.tokens_of_chunk
    return of_text + sizes.encoder_layers * read * sizes.neighbor_tokens + read * sizes.chunk


def retro_activations(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
    """Returns the bytes that autograd saves for one block and one micro batch."""
    saved = block_activations(dims, layout, block)
    if dims.retro is None or not dims.retrieves(block):
        return saved
    read = replace(layout, seq_length=dims.retro.neighbor_length(layout.seq_length))
    saved += cross_activations(dims, layout, read)
    saved += read.tokens * dims.hidden_size * layout.width  # what is joined in front of the text
    if block == dims.retro.blocks[0]:
        plain = replace(dims, retro=None, mixture=replace(dims.mixture, experts=1))
        saved += dims.retro.encoder_layers * block_activations(plain, read, block)
        saved += cross_activations(dims, read, layout)
    return saved
