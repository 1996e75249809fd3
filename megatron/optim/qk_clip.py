"""QK-clip (arXiv:2507.20534, section 2.1): heads whose largest attention logit exceeds a threshold get smaller weights.

After an update the query rows of such a head and its key rows are scaled so that the head's logits shrink by
threshold / largest logit, each by the square root of it. Query heads that share keys have their keys scaled for the
smallest of their factors, and the queries make up for the rest.

Shapes: L attention layers, n query heads, m key heads, d head dim, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Topology
from megatron.distributed.param_attrs import HeadLayout, head_layout, record_logits

FullTensor = Callable[[Parameter], Tensor | None]
"""Parameter -> the full tensor that this rank updates; None on other ranks, and where nothing was updated."""


class QKClip:
    """Scales the joint weights of queries, keys and values after an update."""

    def __init__(self, parameters: Sequence[Parameter], topology: Topology, threshold: float) -> None:
        """Begins to record logits.

        Args:
            parameters: Trained matrices of this rank.
            topology: Layout of the ranks.
            threshold: Largest logit that is not clipped.
        """
        self._topology, self._threshold = topology, threshold
        self._weights = [(one, layout) for one in parameters if (layout := head_layout(one)) is not None]
        self._recorded = [record_logits(one, layout.queries // topology.model.size) for one, layout in self._weights]
        self._largest = parameters[0].new_zeros((), dtype=torch.float32) if parameters else torch.zeros(())

    @torch.no_grad()
    def __call__(self, full_tensor: FullTensor) -> None:
        """Clips the heads of the last update. Collective over data- and tensor-parallel ranks."""
        if not self._weights:
            return
        logits = self._gather(torch.stack(self._recorded))
        self._largest = logits.max()
        for (parameter, layout), found in zip(self._weights, logits, strict=True):
            full = full_tensor(parameter)
            if full is not None:
                full.mul_(row_factors(layout, found, self._threshold).to(full.dtype).unsqueeze(1))
        for recorded in self._recorded:
            recorded.zero_()

    def measured(self) -> dict[str, Tensor]:
        """Returns the largest logit of the last update, before it was clipped. Collective over pipeline stages."""
        largest, pipe = self._largest.clone(), self._topology.pipe
        if pipe.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=pipe.group)
        return {"max_attention_logit": largest}

    def _gather(self, logits: Tensor) -> Tensor:
        """Returns the maxima over data-parallel ranks, of all heads: [L, n/t] -> [L, n]."""
        data, model = self._topology.dp_cp, self._topology.model
        if data.size > 1:
            dist.all_reduce(logits, op=dist.ReduceOp.MAX, group=data.group)
        if model.size == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(model.size)]
        dist.all_gather(parts, logits, group=model.group)
        return torch.cat(parts, 1)


def row_factors(layout: HeadLayout, logits: Tensor, threshold: float) -> Tensor:
    """Returns the factor of each row of the full weight.

    Args:
        layout: Order of the rows.
        logits: Largest logit of each query head [n].
        threshold: Largest logit that is not clipped.
    """
    heads = (threshold / logits.clamp(min=threshold)).view(layout.keys, -1)  # [m, n/m]
    keys = heads.amin(1).sqrt()  # [m]
    queries = (heads / keys.unsqueeze(1)).flatten()  # [n]
    values = torch.ones_like(keys)
    if layout.grouped:
        by_head = torch.cat((queries, keys, values))
    else:
        by_head = torch.stack((queries, keys, values), 1).flatten()
    return by_head.repeat_interleave(layout.head_dim)
