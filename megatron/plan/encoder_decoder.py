"""FLOPs and activations of an encoder-decoder, whose two stacks read sequences of different lengths.

A weight multiplies the tokens of its stack, those of cross attention's keys and values the encoder's. FLOPs are
counted as in flops.py. Activations are joined along the sequence between blocks, so a block that saves its input keeps
the other stack's part too.

s encoder tokens, u decoder tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron.config import Config
from megatron.param_table import FIRST_BLOCK, ModelDims, TensorShape
from megatron.plan.activation_layout import ActivationLayout
from megatron.plan.memory import FP32, block_activations
from megatron.registry import POSITIONS


def two_stack_flops(
    dims: ModelDims, table: Sequence[TensorShape], *, lengths: tuple[int, int], train_batch_size: int
) -> int:
    """Returns the FLOPs of forward and backward over the global batch.

    Args:
        dims: of the model.
        table: every tensor of the model.
        lengths: s and u [tokens].
        train_batch_size: [samples].
    """
    source, target = lengths
    products = 0
    for tensor in table:
        if tensor.kind == "weight":
            of_encoder = dims.encodes(tensor.layer - FIRST_BLOCK) or tensor.name.startswith("cross_attention.key_value")
            products += tensor.count * (source if of_encoder else target)
        elif tensor.kind == ("word_embedding" if dims.tied else "head"):
            products += tensor.count * target
    decoder = dims.num_layers - dims.encoder_layers
    scores = dims.encoder_layers * source * source + decoder * target * (target + source)
    return 3 * (2 * products + 4 * scores * dims.query_size) * train_batch_size


def two_stack_activations(config: Config) -> Callable[[ModelDims, ActivationLayout, int], int]:
    """Returns what gives the bytes that autograd saves for one block and one micro batch."""
    source, target = config.model.encoder_seq_length or 0, config.model.decoder_seq_length or 0

    def of_block(dims: ModelDims, layout: ActivationLayout, block: int) -> int:
        encodes = dims.encodes(block)
        stacks = [replace(layout, seq_length=length) for length in (source, target)]
        own, other = stacks if encodes else stacks[::-1]
        saved = block_activations(dims, own, block) + other.residual_tokens * dims.hidden_size * layout.width
        if not encodes:
            return saved + cross_activations(dims, own, other)
        relative = "scores" in POSITIONS.entry(dims.pos_emb).enters and not layout.selective
        if not relative:
            return saved
        copies = 3 * own.tokens * dims.query_size // own.model_parallel_size * own.width  # scaled queries, keys, values
        return saved + copies + _probabilities(dims, own, source)

    return of_block


def cross_activations(dims: ModelDims, own: ActivationLayout, source: ActivationLayout) -> int:
    """Returns the bytes of cross attention: input and output of its norm, queries, keys, values and output."""
    ranks, width = own.model_parallel_size, own.width
    query, kv = dims.query_size // ranks, dims.kv_size // ranks
    norm = own.residual_tokens * (2 * dims.hidden_size * width + 2 * FP32)
    core = (own.tokens * 2 * query + source.tokens * 2 * kv) * width
    saved = norm + core + own.tokens * FP32 * dims.num_attention_heads // ranks
    if own.hidden_dropout:
        saved += own.residual_tokens * dims.hidden_size
    return saved + (_probabilities(dims, own, source.seq_length) if own.attention_dropout else 0)


def _probabilities(dims: ModelDims, own: ActivationLayout, keys: int) -> int:
    """Returns the bytes of fp32 probabilities of each query and key, and of a copy in a lower precision."""
    heads = dims.num_attention_heads // own.model_parallel_size
    copies = FP32 + (own.width if own.width < FP32 else 0) + (1 if own.attention_dropout else 0)
    return own.tokens * heads * keys * copies
