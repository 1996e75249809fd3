"""Activations of a pipeline stage: of its blocks and output layer, for the micro batches under way. All in bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron.param_table import ModelDims
from megatron.plan.activation_layout import ActivationLayout
from megatron.plan.memory import block_activations, head_activations, ring_buffers


def stage_activations(
    dims: ModelDims,
    layout: ActivationLayout,
    *,
    blocks: Sequence[int],
    under_way: int,
    padded_vocab_size: int | None,
    pipelined: bool = False,
    of_block: Callable[[ModelDims, ActivationLayout, int], int] = block_activations,
    head_length: int | None = None,
) -> tuple[int, int]:
    """Returns the bytes of the micro batches under way in a stage, and those that one pass of it adds.

    The second are held at the end of a forward pass or when a group of blocks is recomputed, by one stage of a rank at
    a time.

    Args:
        dims: of the model.
        layout: the settings.
        blocks: numbers of its blocks.
        under_way: micro batches between their forward and backward pass.
        padded_vocab_size: None where the stage has no output layer.
        pipelined: whether tensors sent to and received from other stages are counted.
        of_block: bytes that autograd saves for one block.
        head_length: tokens of a sequence that reach the output layer; all unless given.
    """
    sizes = [of_block(dims, layout, block) for block in blocks]
    predicted = layout if head_length is None else replace(layout, seq_length=head_length)
    carried = dims.hidden_size + (dims.kv_size if dims.value_residual else 0)
    full = layout.tokens * carried * layout.width
    boundary = int(full * layout.saved_fraction)
    group = min(layout.recompute, len(sizes))
    head = 0 if padded_vocab_size is None else head_activations(dims, predicted, padded_vocab_size)
    if padded_vocab_size is not None and dims.mtp_layers:  # embedding, both norms' outputs side by side, what they join
        joined = layout.residual_tokens * 5 * dims.hidden_size * layout.width
        head += dims.mtp_layers * (head + joined)
    if layout.first_only:
        saved = group * boundary + sum(sizes[group:])
        repeated = group * boundary + max(sizes[:group], default=0)  # by then the others have been backpropagated
    elif group:
        saved = -(-len(sizes) // group) * boundary
        repeated = saved + max(sum(sizes[first : first + group]) for first in range(0, len(sizes), group))
    else:
        saved = repeated = sum(sizes)
    sent = (under_way + 1) * full if pipelined else 0
    return under_way * saved + sent, max(saved + head, repeated + ring_buffers(dims, layout)) - saved
