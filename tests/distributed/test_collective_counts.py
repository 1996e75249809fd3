"""How often tensor-parallel ranks with sequence parallelism communicate in a step."""

from __future__ import annotations

from collections import Counter
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.config import Resources, resolve
from megatron.data.dataset.batch import make_batch
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_training_engine
from tests.multi_rank import run_cases

LAYERS, MICRO_BATCHES, TOKENS = 3, 2, 64
NAMES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all_single",
)
BASE: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "pos_emb": "rotary",
    "model_parallel_size": 2,
    "sequence_parallel": True,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "train_iters": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3}},
    "vocab_size": TOKENS,
    "distributed_backend": "gloo",
}
SEQUENTIAL = {"all_gather_into_tensor": 2 + 2, "reduce_scatter_tensor": 2 + 2}
"""Of a block, forward and backward: attention and MLP each gather and scatter once, and once again."""
PARALLEL = {"all_gather_into_tensor": 2 + 1, "reduce_scatter_tensor": 1 + 2}
"""One sum for both, whose gradient is gathered once, together with the inputs of both."""
ENDS = {"all_gather_into_tensor": 1 + 1 + 1, "reduce_scatter_tensor": 1 + 1}
"""Embedding, output layer, and the numbers of the loss."""
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "sequential": ({}, SEQUENTIAL),
    "grouped, gated": ({"norm": "rmsnorm", "activation": "swiglu", "mlp_multiple_of": 8}, SEQUENTIAL),
    "parallel": ({"gpt_j_residual": True}, PARALLEL),
    "parallel, one norm": ({"gpt_j_residual": True, "gpt_j_tied": True}, PARALLEL),
    "bfloat16": ({"precision": "bfloat16"}, SEQUENTIAL),
}


def counted(rank: int, world_size: int, settings: dict[str, Any]) -> dict[str, int]:
    """The collectives of a step after the first."""
    config = resolve([], settings, Resources(world_size)).config
    topology = init_distributed(
        pipe_parallel_size=0, model_parallel_size=2, seed=1, sequence_parallel=True, backend="gloo"
    )
    engine = build_training_engine(config, topology, padded_vocab_size=TOKENS)
    batches = cycle([make_batch(torch.arange(17).unsqueeze(0), eod=0, eod_mask_loss=False)])
    engine.train_step(batches, 1e-3)
    found: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            own = getattr(dist, name)

            def count(*given: Any, own: Any = own, name: str = name, **named: Any) -> Any:
                found[name] += 1
                return own(*given, **named)

            patch.setattr(dist, name, count)
        engine.train_step(batches, 1e-3)
    return dict(found)


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, int]]]:
    return run_cases({name: (counted, {**BASE, **settings}) for name, (settings, _) in CASES.items()}, 2)


@pytest.mark.parametrize("name", CASES)
def test_a_region_gathers_its_input_with_the_gradient_behind_it(
    name: str, found: dict[str, list[dict[str, int]]]
) -> None:
    """Two all-reduces a step: partial gradients, and the gradient norm."""
    block = CASES[name][1]
    expected = {kind: MICRO_BATCHES * (LAYERS * block[kind] + ENDS[kind]) for kind in ENDS} | {"all_reduce": 2}
    assert found[name] == [expected, expected]
