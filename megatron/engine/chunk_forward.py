"""Forward pass outside training through several pipeline stages on each rank.

s sequence, b batch, h hidden, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.engine.inference_forward import Layer, gather_vocabulary
from megatron.model.kv_cache import KVCache
from megatron.pipe_schedule.layout import PipeLayout


def chunk_logits(
    chunks: Sequence[Sequence[Layer]],
    layout: PipeLayout,
    tokens: Tensor,
    cache: KVCache | None,
    topology: Topology,
    *,
    received: Callable[[int, int, int], tuple[int, int, int]],
    padded_vocab_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Runs the stages one after the other and returns the logits [b, s, v] on all ranks. Collective over the pipe axis.

    Args:
        chunks: layers of each of this rank's stages, called as layer(carry, cache).
        layout: which stages each rank holds.
        tokens: [b, s].
        cache: cache of earlier tokens.
        topology: layout of the ranks.
        received: (stage, tokens of the residual stream of each sample, samples) -> shape of the stage's input.
        padded_vocab_size: width of the logits.
        dtype: type of the carry.
    """
    pipe = topology.pipe
    batch, length = tokens.shape
    rows = length // topology.model.size if topology.model.sequence_parallel else length
    carry = tokens.to(device())
    for stage in range(layout.stages):
        owner = layout.rank_of(stage)
        if stage > 0 and layout.rank_of(stage - 1) != owner:
            shape = received(stage, rows, batch)
            carry = _moved(carry, shape, dtype, topology, (layout.rank_of(stage - 1), owner))
        if owner == pipe.rank:
            for layer in chunks[layout.stages_of(pipe.rank).index(stage)]:
                carry = layer(carry, cache)
    if cache is not None:
        cache.advance(length)
    last = layout.rank_of(layout.stages - 1)
    if pipe.rank == last:
        logits = gather_vocabulary(carry, topology).contiguous()  # [b, s, v]
    else:
        logits = torch.empty(batch, length, padded_vocab_size, device=device())  # [b, s, v]
    dist.broadcast(logits, src=pipe.ranks[last], group=pipe.group)
    return logits


def _moved(
    carry: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, topology: Topology, between: tuple[int, int]
) -> Tensor:
    """Sends the carry from one rank of the pipeline to another; the others keep theirs.

    Args:
        carry: output of the stage before, where this rank has it.
        shape: of the carry.
        dtype: of the carry.
        topology: layout of the ranks.
        between: the rank that sends and the rank that receives.
    """
    pipe, (source, target) = topology.pipe, between
    if pipe.rank == source:
        dist.send(carry.contiguous(), dst=pipe.ranks[target], group=pipe.group)
    elif pipe.rank == target:
        carry = torch.empty(*shape, dtype=dtype, device=device())
        dist.recv(carry, src=pipe.ranks[source], group=pipe.group)
    return carry
