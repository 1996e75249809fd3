"""The forward pass outside training: through one module or through the stages of a pipeline.

s sequence, b micro batch, h hidden, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.model.cache import KVCache
from megatron.parallel.bootstrap import device
from megatron.parallel.collectives import gather_from
from megatron.parallel.topology import Topology

Layer = Callable[..., Tensor]


def gather_vocabulary(logits: Tensor, topology: Topology) -> Tensor:
    """[s, b, v/t] of every tensor-parallel rank -> [b, s, v] in fp32 on all of them."""
    return gather_from(logits, topology.model).transpose(0, 1).float()  # [b, s, v]


def through_stages(
    layers: Sequence[Layer],
    tokens: Tensor,
    cache: KVCache | None,
    topology: Topology,
    *,
    hidden_size: int,
    padded_vocab_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Runs this stage's layers between a receive and a send, and shares the last stage's logits [b, s, v].

    layers: those of this stage, each called as layer(carry, cache). Collective over the pipe axis.
    """
    pipe = topology.pipe
    batch, length = tokens.shape
    carry = tokens.to(device())
    if not pipe.is_first:
        carry = torch.empty(length, batch, hidden_size, dtype=dtype, device=device())  # [s, b, h]
        dist.recv(carry, src=pipe.ranks[pipe.rank - 1], group=pipe.group)
    for layer in layers:
        carry = layer(carry, cache)
    if cache is not None:
        cache.advance(length)
    if not pipe.is_last:
        dist.send(carry.contiguous(), dst=pipe.ranks[pipe.rank + 1], group=pipe.group)
        logits = torch.empty(batch, length, padded_vocab_size, device=device())  # [b, s, v]
    else:
        logits = gather_vocabulary(carry, topology).contiguous()  # [b, s, v]
    if pipe.size > 1:
        dist.broadcast(logits, src=pipe.ranks[-1], group=pipe.group)
    return logits
