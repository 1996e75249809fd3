"""Blocks compiled by torch.compile, each as one piece of the model (`compile`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from megatron.model.block import TransformerBlock
from megatron.model.kv_cache import KVCache

Forward = Callable[[Tensor, KVCache | None, Tensor | None], Tensor]


def compile_blocks(model: Module, shape: tuple[int, int, int]) -> None:
    """Compiles what every block of attention and MLP computes on whole sequences; with a cache it runs as it is.

    shape: of what a block computes on in training, [s, b, h] ([s/t, b, h] with sequence parallelism). ZeRO 3 gathers
    the parameters of a compiled block together, so that nothing happens between its operations.
    """
    for block in model.modules():
        if isinstance(block, TransformerBlock):
            _fill_tables(block, shape)
            block.forward = _on_whole_sequences(block.forward)  # type: ignore[method-assign, assignment]
            block.zero3_gather_together = True


@torch.no_grad()
def _fill_tables(block: TransformerBlock, shape: tuple[int, int, int]) -> None:
    """Runs a block once as it is: a table of positions that appears later would make a second graph of a step."""
    like = next(block.parameters())
    was_training = block.training
    block.eval()
    block(torch.zeros(shape, dtype=like.dtype, device=like.device))
    block.train(was_training)


def _on_whole_sequences(plain: Forward) -> Forward:
    compiled = torch.compile(plain, options={"fallback_random": True})  # the same dropout masks as without

    def forward(hidden: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        return plain(hidden, cache, document_starts) if cache is not None else compiled(hidden, None, document_starts)

    return forward
