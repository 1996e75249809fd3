"""A soft prompt of shared sequences: a rank has the vectors of its own positions, and its term of the gradient."""

from __future__ import annotations

import torch

from megatron.adapter_config import SoftPrompt
from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.param_init import ParamFactory
from megatron.model.soft_prompt import SoftPromptEmbedding


def test_shards_of_a_ring_have_the_vectors_of_their_positions() -> None:
    """A prompt of 7 vectors before 16 tokens, in chunks of 4: two ranks have a part of it, and another chunk each."""
    source = ParamFactory(seed=3, layer=0, axis=Topology.single().model, dtype=torch.float64)
    prompt = SoftPromptEmbedding(SoftPrompt(7, "", 0.5), 4, source)
    hidden = torch.randn(16, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = prompt(hidden, 0)
    expected.square().sum().backward()
    gradient, prompt.weight.grad = prompt.weight.grad, None
    assert gradient is not None
    ranks = range(2)
    for rank in ranks:
        axis = Axis("context", 2, rank, tuple(ranks))
        at = SequenceShards(axis, ring=axis).positions(8, hidden.device)
        found = prompt(hidden[at], 8, at[None])
        assert torch.equal(found, expected[at])
        found.square().sum().backward()
    torch.testing.assert_close(prompt.weight.grad, gradient)
