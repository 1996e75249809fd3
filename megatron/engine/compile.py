"""Compiles blocks with torch.compile, one graph a block (`compile`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from megatron.model.attention.self_attention import SelfAttention
from megatron.model.block import TransformerBlock
from megatron.model.kv_cache import KVCache

Forward = Callable[..., Tensor]


def compile_blocks(model: Module, shape: tuple[int, int, int]) -> None:
    """Compiles the forward pass of every block of attention and MLP on full sequences; with a cache it stays eager.

    ZeRO 3 gathers the parameters of a compiled block together, so that there is no gathering between its operations.
    shape: residual stream of a block in training, [s, b, h] ([s/t, b, h] with sequence parallelism).
    """
    for block in model.modules():
        if isinstance(block, TransformerBlock):
            _fill_tables(block, shape)
            block.forward = _without_cache(block.forward)  # type: ignore[method-assign]
            block.zero3_gather_together = True
        elif isinstance(block, SelfAttention):
            block.ring = torch.compiler.disable(block.ring)  # its messages are no operators of a graph


@torch.no_grad()
def _fill_tables(block: TransformerBlock, shape: tuple[int, int, int]) -> None:
    """Runs a block once eagerly: a position table that is created later would cause a second graph."""
    like = next(block.parameters())
    was_training = block.training
    block.eval()
    block(torch.zeros(block.input_shape(shape), dtype=like.dtype, device=like.device))
    block.train(was_training)


def _without_cache(plain: Forward) -> Forward:
    compiled = torch.compile(plain, options={"fallback_random": True})  # the same dropout masks as in eager mode

    def forward(
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        return (plain if cache is not None else compiled)(hidden, cache, document_starts, padding)

    return forward
