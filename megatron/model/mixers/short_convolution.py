"""The short causal convolution of Mamba and Mamba-2: every channel sees its last few positions.

Shapes: b batch, s sequence, d channels of this rank, w width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron.distributed.context_parallel.states import StatePassing
from megatron.distributed.param_init import InitFn, ParamFactory
from megatron.model.kv_cache import KVCache


class ShortConvolution(nn.Module):
    """Parameters of a depthwise convolution: ``weight`` [d, 1, w] and ``bias`` [d], as in torch."""

    def __init__(
        self, channels: int, width: int, source: ParamFactory, *, bias: bool, sections: tuple[int, ...] = ()
    ) -> None:
        """Creates the parameters.

        Args:
            channels: of all ranks.
            width: w.
            source: creates the parameters.
            bias: true for a bias.
            sections: channels that are sharded separately.
        """
        super().__init__()
        init_fn = uniform(1 / math.sqrt(width))
        self.weight = source.sharded("weight", (channels, 1, width), init_fn, dim=0, sections=sections)
        self.bias = source.sharded("bias", (channels,), init_fn, dim=0, sections=sections) if bias else None

    @property
    def taps(self) -> Tensor:
        """[d, w]."""
        return self.weight.squeeze(1)

    def inputs_before(self, x: Tensor, number: int, cache: KVCache | None, states: StatePassing) -> Tensor:
        """Returns the inputs before x [b, s, d] that it reads, [b, w - 1, d]; the cache gets the last ones of x.

        Args:
            x: inputs.
            number: of the block.
            cache: states of earlier tokens, or None.
            states: passes inputs from rank to rank where ranks share a sequence.
        """
        width = self.weight.shape[2] - 1
        if cache is not None:
            memory = cache.state(number, "convolution")
            before = memory.clone()
            memory.copy_(_last(torch.cat((before, x.to(before.dtype)), dim=1), width, cache.valid_mask(x.shape[1])))
            return before
        return states.positions_before(x, width) if states.active else x.new_zeros(x.shape[0], width, x.shape[2])


def _last(seen: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """Returns the last `count` valid positions of each row: [b, count + s, ...] -> [b, count, ...]."""
    if valid is None:
        return seen[:, seen.shape[1] - count :]
    at = valid.sum(1, keepdim=True) + torch.arange(count, device=seen.device)  # [b, count]
    return seen.gather(1, at.unsqueeze(-1).expand(-1, -1, seen.shape[2]))


def uniform(bound: float) -> InitFn:
    """Returns what draws from -bound to bound."""

    def init_fn(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-bound, bound, generator=generator)

    return init_fn
