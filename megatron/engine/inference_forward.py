"""Forward pass outside training: through one module or through pipeline stages.

s sequence, b micro batch, h hidden, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.collectives import gather_from
from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.model.kv_cache import KVCache
from megatron.sequence_parts import sequence_multiple

Layer = Callable[..., Tensor]


def shard_prompt(tokens: Tensor, cache: KVCache | None, topology: Topology) -> Tensor:
    """Returns this rank's shard of the tokens [b, s], padded at the end to a length that can be sharded.

    A model is causal, so padding changes no other position. Raises ValueError for a cache, which needs full sequences.
    """
    axis = topology.model
    tensor = axis.size if axis.sequence_parallel else 1
    parts = sequence_multiple(topology.context.size, topology.ulysses.size, tensor, zigzag=topology.zigzag)
    if parts == 1:
        return tokens
    if cache is not None:
        raise ValueError("generation with a cache needs an engine without sequence and context parallelism")
    padded = torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % parts))
    return SequenceShards.of(topology).shard(padded)


def gather_context(logits: Tensor, topology: Topology) -> Tensor:
    """Gathers the logits of full sequences from context-parallel ranks: [b, s/c, v] -> [b, s, v]."""
    axis = topology.context
    if axis.size == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(axis.size)]
    dist.all_gather(parts, logits.contiguous(), group=axis.group)
    return SequenceShards.of(topology).restore(torch.cat(parts, dim=1))


def gather_vocabulary(logits: Tensor, topology: Topology) -> Tensor:
    """Gathers [s, b, v/t] from tensor-parallel ranks -> [b, s, v] in fp32 on all of them."""
    return gather_from(logits, topology.model).transpose(0, 1).float()  # [b, s, v]


def pipeline_forward(
    layers: Sequence[Layer],
    tokens: Tensor,
    cache: KVCache | None,
    topology: Topology,
    *,
    received: Callable[[int, int], tuple[int, int, int]],
    padded_vocab_size: int,
    dtype: torch.dtype,
    at: Tensor | None = None,
) -> Tensor:
    """Receives the input, runs this stage's layers, sends the output, and broadcasts the last stage's logits [b, s, v].

    Collective over the pipe axis.

    Args:
        layers: layers of this stage, each called as layer(carry, cache).
        tokens: [b, s].
        cache: cache of earlier tokens.
        topology: layout of the ranks.
        received: (tokens of the residual stream of each sample, samples) -> shape of this stage's input.
        padded_vocab_size: width of the logits.
        dtype: type of the carry.
        at: positions in the flattened [b, s] whose logits are computed instead of all, [k, v].
    """
    pipe = topology.pipe
    batch, length = tokens.shape
    carry = tokens.to(device())
    if not pipe.is_first:
        rows = length // topology.model.size if topology.model.sequence_parallel else length
        carry = torch.empty(*received(rows, batch), dtype=dtype, device=device())
        dist.recv(carry, src=pipe.ranks[pipe.rank - 1], group=pipe.group)
    for layer in layers if at is None or not pipe.is_last else layers[:-1]:
        carry = layer(carry, cache)
    if at is not None and pipe.is_last:
        carry = layers[-1](select_positions(carry, at), cache)  # [k, 1, v/t]
    if cache is not None:
        cache.advance(length)
    if not pipe.is_last:
        dist.send(carry.contiguous(), dst=pipe.ranks[pipe.rank + 1], group=pipe.group)
        shape = (batch, length) if at is None else (1, len(at))
        logits = torch.empty(*shape, padded_vocab_size, device=device())  # [b, s, v]
    else:
        logits = gather_vocabulary(carry, topology).contiguous()  # [b, s, v]
    if pipe.size > 1:
        dist.broadcast(logits, src=pipe.ranks[-1], group=pipe.group)
    return logits if at is None else logits[0]  # [k, v]


def select_positions(hidden: Tensor, at: Tensor) -> Tensor:
    """Selects positions of [s, b, h] by their index in the flattened [b, s] -> [k, 1, h]."""
    length = hidden.shape[0]
    return hidden[at % length, at // length].unsqueeze(1)  # [k, 1, h]
