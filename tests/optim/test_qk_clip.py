"""QK-clip: the largest logits that attention records, and what is left of them after a step, in every layout."""

from __future__ import annotations

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.distributed.param_attrs import HeadLayout
from megatron.engine.builder import build_training_engine, init_topology
from megatron.kernels.max_logits import max_logits
from megatron.optim.qk_clip import row_factors
from tests.end_to_end import engines
from tests.multi_rank import run_distributed
from tests.options import Keys

THRESHOLD, TINY = 0.02, 1.0e-9
CLIP = {"type": "muon", "params": {"lr": 1.0e-3, "qk_clip_threshold": THRESHOLD}}
KEYS: Keys = {
    "num_layers": 1,  # clipping a layer changes what the next one gets
    "optimizer": CLIP,
    "use_bias_in_attn_linear": False,
    "weight_decay": 0.0,
    "zero_optimization": {"stage": 0},
}
LOW: Keys = {**KEYS, "precision": "bfloat16", "zero_optimization": {"stage": 1}}
LAYOUTS: dict[str, tuple[int, Keys]] = {
    "fp32": (1, KEYS),
    "fp32, tensor 2": (2, {**KEYS, **engines.TENSOR}),
    "fp32, recomputed, data 2": (2, {**KEYS, "checkpoint_activations": True}),
    "bfloat16": (1, LOW),
    "bfloat16, tensor 2": (2, {**LOW, **engines.TENSOR}),
    "bfloat16, data 2": (2, LOW),
    "bfloat16, two layers, pipeline 2": (2, {**LOW, **engines.PIPELINE, "num_layers": 2}),
    "fp32, shared keys": (1, {**KEYS, "num_kv_heads": 2}),
    "bfloat16, shared keys, tensor 2": (2, {**LOW, **engines.TENSOR, "num_kv_heads": 2}),
}


@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("length", [7, 300])
def test_the_largest_logit_is_that_of_all_causal_pairs(keys: int, length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, heads, length, 8, generator=generator) for heads in (4, keys))
    scores = (q.double() @ k.double().repeat_interleave(4 // keys, 1).mT) / 8**0.5
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    assert max_logits(q, k).double() == pytest.approx(scores.amax((0, 2, 3)), rel=1e-5)


@pytest.mark.parametrize(("keys", "grouped"), [(4, False), (4, True), (2, True), (1, True)])
def test_every_head_shrinks_by_its_own_factor_and_values_stay(keys: int, grouped: bool) -> None:
    """The logits of a head are products of its rows for queries and those for its keys."""
    layout, size = HeadLayout(4, keys, 3, grouped), 3
    logits = torch.tensor([50.0, 100.0, 200.0, 800.0])
    factors = row_factors(layout, logits, 100.0)
    heads = factors.view(-1, size)
    assert (heads == heads[:, :1]).all()
    found = heads[:, 0]
    queries, key, values = (
        (found[:4], found[4 : 4 + keys], found[4 + keys :]) if grouped else found.view(4, 3).unbind(1)
    )
    product = queries * key.repeat_interleave(4 // keys)
    assert product == pytest.approx(torch.tensor([1.0, 1.0, 0.5, 0.125]))
    assert (values == 1.0).all()


def maxima(rank: int, world_size: int, keys: Keys) -> list[float]:
    """The largest logits of three steps with hardly any update."""
    config = resolve([], {**engines.BASE, **keys}, Resources(world_size)).config
    topology = init_topology(config)
    engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
    found = []
    for _ in range(3):
        result = engine.train_step(iter(engines.batches(config, topology)), TINY)
        found.append(float(result.more["max_attention_logit"]))
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """Of one process in fp32: one layer, one with shared keys, two layers."""
    cases = {"fp32": KEYS, "shared": {**KEYS, "num_kv_heads": 2}, "two layers": {**KEYS, "num_layers": 2}}
    return {name: run_distributed(maxima, 1, keys)[0] for name, keys in cases.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_capped_after_a_step(layout: str, alone: dict[str, list[float]]) -> None:
    ranks, keys = LAYOUTS[layout]
    tolerance = 0.03 if "bfloat16" in layout else 1e-4
    for found in run_distributed(maxima, ranks, keys):
        case = next((name for name in ("shared", "two layers") if name in layout), "fp32")
        assert found == pytest.approx(alone[case], rel=tolerance)
        assert found[0] > 1.5 * THRESHOLD
        if case != "two layers":
            assert found[1] == pytest.approx(THRESHOLD, rel=tolerance)
            assert found[2] <= THRESHOLD * (1 + tolerance)
