"""A model with experts trains alike in every layout: losses, losses of the routers and gradient norms, clipping active.

No token is dropped. A wrong group of an expert's gradient, an expert counted twice in the norm, a loss of a router that
is missing on some stage or scaled wrongly breaks these. Tolerances are those of tests/parity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import make_documents, run, series
from tests.layouts import pick

EXPERTS: dict[str, Any] = {
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_expert_interval": 2,
    "moe_router_type": "topk",
    "moe_normalize_top_k": True,
    "moe_aux_loss_coeff": 0.05,
    "moe_z_loss_coeff": 0.01,
    "use_bias_in_mlp": False,
    "train_iters": 5,
    "eval_interval": 5,
    "eval_iters": 1,
}
SPREAD = {"moe_expert_parallel_size": 2}
LAYOUTS = pick(
    "tensor 2",
    "tensor 2, sequence",
    "data 2",
    "data 2, experts 2",
    "data 2, experts 2, ZeRO 1",
    "data 4, experts 2, ZeRO 2",
    "data 2, ZeRO 3",
    "context 2, experts 2",
    "pipeline 2",
    "pipeline 2, data 2, experts 2",
    "pipeline 2, data 2, experts 2, ZeRO 1",
    "tensor 2, data 2, experts 2",
    "recomputed",
)
NAMES = ("train/lm_loss", "validation/lm_loss", "train/moe_load_balance_loss", "train/moe_z_loss")


@pytest.fixture(scope="module")
def single(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return run(1, tmp_path_factory.mktemp("single"), data_path=dataset, **EXPERTS)


def compare(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for name in NAMES:
        assert series(found, name) == pytest.approx(series(expected, name), rel=1e-5), name
        assert series(expected, name)
    norms, target = series(found, "train/grad_norm"), series(expected, "train/grad_norm")
    assert norms[0] == pytest.approx(target[0], rel=1e-5)
    assert norms == pytest.approx(target, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_alike(layout: str, single: list[dict[str, float]], dataset: str, tmp_path: Path) -> None:
    ranks, settings = LAYOUTS[layout]
    compare(run(ranks, tmp_path, data_path=dataset, **{**EXPERTS, **settings}), single)


PADDED = pick(
    "pipeline 2, data 2, experts 2",
    "tensor 2, sequence",
    "context 2, experts 2",
    "data 2, accumulation 2",
    "recomputed",
)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Short documents, one a sample."""
    documents = make_documents(tmp_path_factory.mktemp("padded"), longest=30)[0]
    return {**EXPERTS, "train_iters": 2, "eval_interval": 2, "data_path": documents, "pack_impl": "unpacked"}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("layout", PADDED)
def test_padding_counts_in_no_layout(layout: str, apart: bool, padded: dict[str, Any], tmp_path: Path) -> None:
    """Of samples that are padded differently on every rank; with starts of documents beside the mask, and without."""
    ranks, settings = PADDED[layout]
    same = {"gradient_accumulation_steps": settings.get("gradient_accumulation_steps", 1)}
    mask = {"reset_attention_mask": apart}
    compare(run(ranks, tmp_path / "many", **{**padded, **mask, **settings}), run(1, tmp_path, **padded, **mask, **same))


def test_more_padding_changes_nothing(padded: dict[str, Any], tmp_path: Path) -> None:
    compare(run(1, tmp_path / "more", **padded, seq_length=60, max_position_embeddings=60), run(1, tmp_path, **padded))


def test_accumulation_without_a_balance_loss(dataset: str, tmp_path: Path) -> None:
    """The balance loss looks at one micro batch at a time, so it is another one there; everything else is the same."""
    settings = {**EXPERTS, "moe_aux_loss_coeff": 0.0, "data_path": dataset}
    one = run(1, tmp_path / "one", **settings)
    two = run(2, tmp_path / "two", **settings, pipe_parallel_size=2, gradient_accumulation_steps=4)
    for name in ("train/lm_loss", "train/moe_z_loss"):
        assert series(two, name) == pytest.approx(series(one, name), rel=1e-5), name


def test_accumulation_is_the_same_with_a_pipeline(dataset: str, tmp_path: Path) -> None:
    settings = {**EXPERTS, "gradient_accumulation_steps": 4, "data_path": dataset}
    compare(
        run(2, tmp_path / "two", **settings, pipe_parallel_size=2),
        run(1, tmp_path / "one", **settings),
    )


def test_a_checkpoint_continues_with_experts_elsewhere(dataset: str, tmp_path: Path) -> None:
    """Saved after 3 steps by 4 ranks that spread the experts (ZeRO 2), continued by others."""
    settings = {**EXPERTS, "data_path": dataset, "save": str(tmp_path / "kept"), "train_iters": 6, "eval_interval": 6}
    zero = {"zero_optimization": {"stage": 2}}
    full = run(4, tmp_path / "first", **settings, **SPREAD, **zero, checkpoint_factor=3)
    again = {**settings, "load": str(tmp_path / "kept"), "iteration": 3, "save": None, "checkpoint_factor": None}
    for number, (ranks, layout) in enumerate(
        [
            (1, {}),
            (2, {**SPREAD, "zero_optimization": {"stage": 1}}),
            (4, {"moe_expert_parallel_size": 4}),
            (4, {"model_parallel_size": 2, **SPREAD}),
            (2, {"pipe_parallel_size": 2}),
        ]
    ):
        found = run(ranks, tmp_path / str(number), **{**again, **layout})
        for name in ("train/lm_loss", "train/grad_norm"):
            assert series(found, name) == pytest.approx(series(full, name)[3:], rel=1e-4), (layout, name)


def test_bfloat16_trains(dataset: str, tmp_path: Path) -> None:
    """Spread experts and a pipeline, where DeepSpeed's own optimizer keeps the fp32 weights."""
    settings = {**EXPERTS, "precision": "bfloat16", "zero_optimization": {"stage": 1}, "train_iters": 8}
    found = run(4, tmp_path, data_path=dataset, **settings, **SPREAD, pipe_parallel_size=2)
    losses = series(found, "train/lm_loss")
    assert losses[-1] < losses[0]
    assert all(0.9 < value < 4 for value in series(found, "train/moe_load_balance_loss"))


def test_a_full_expert_passes_tokens_on(dataset: str, tmp_path: Path) -> None:
    """A capacity below the fair share drops tokens, and the run says how many."""
    settings = {**EXPERTS, "moe_capacity_factor": 0.5, "moe_min_capacity": 1, "moe_jitter_eps": 0.1}
    found = run(2, tmp_path, data_path=dataset, **settings, **SPREAD)
    assert all(0.45 < value < 1 for value in series(found, "train/moe_dropped"))
    assert series(found, "train/lm_loss")[-1] < series(found, "train/lm_loss")[0]


def test_sinkhorn_trains(dataset: str, tmp_path: Path) -> None:
    """The router of the public default; two ranks with micro batches of 4 are one with two of them."""
    settings = {**EXPERTS, "moe_router_type": "sinkhorn", "moe_normalize_top_k": False, "moe_top_k": 1}
    settings |= {"moe_aux_loss_coeff": 0.0, "data_path": dataset}
    two = run(2, tmp_path / "two", **settings, **SPREAD)
    one = run(1, tmp_path / "one", **settings, gradient_accumulation_steps=2)
    assert series(two, "train/lm_loss") == pytest.approx(series(one, "train/lm_loss"), rel=1e-5)
