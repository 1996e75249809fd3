"""Muon in bfloat16: in every layout the losses and norms of one process, and the same after a change of layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.end_to_end.engines import CONTEXT, PIPELINE, SAVED, TENSOR, Curves, train
from tests.end_to_end.runs import run
from tests.multi_rank import run_distributed
from tests.options import Keys

PARAMS = {"lr": 1.0e-3, "eps": 1.0e-6}
LOW: Keys = {"precision": "bfloat16", "zero_optimization": {"stage": 1}, "lr_decay_style": "constant"}
MIXTURE: Keys = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk", "use_bias_in_mlp": False}
APART: Keys = {"optimizer": {"type": "muon", "params": {**PARAMS, "split_experts": True}}}
OPTIONS = {"split_qkv": True, "ns_coefficients": "polar_express", "normuon": True, "momentum_dtype": "bfloat16"}
CASES: dict[str, Keys] = {
    "dense": {**LOW, "optimizer": {"type": "muon", "params": PARAMS}},
    "experts": {**LOW, **MIXTURE, **APART},
    "options, experts": {
        **LOW,
        **MIXTURE,
        "optimizer": {"type": "muon", "params": {**PARAMS, **OPTIONS, "split_experts": True}},
    },
}
LAYOUTS: dict[str, tuple[int, Keys]] = {
    "tensor 2": (2, TENSOR),
    "pipeline 2": (2, PIPELINE),
    "data 2": (2, {}),
    "context 2": (2, {**CONTEXT, "zero_optimization": {"stage": 1}}),
    "experts 2": (2, {"moe_expert_parallel_size": 2}),
    "data 2, tensor 2, experts 2": (4, {"model_parallel_size": 2, "moe_expert_parallel_size": 2}),
}


def near(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    """bfloat16 has 8 bits: what other sums round moves a loss of 4 nats by some thousandths, a norm by hundredths.

    A step moves the loss by 0.15.
    """
    for at, tolerance in ((0, 3e-3), (1, 2e-2)):
        assert [pair[at] for pair in found] == pytest.approx([pair[at] for pair in expected], rel=tolerance)


@pytest.fixture(scope="module")
def alone() -> Curves:
    return run_distributed(train, 1, CASES, {})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_compute_what_one_process_does(layout: str, alone: Curves) -> None:
    world, keys = LAYOUTS[layout]
    cases = {name: case for name, case in CASES.items() if "experts" in name or "experts" not in layout}
    for found in run_distributed(train, world, cases, keys):
        for name in cases:
            near(found[name], alone[name])


def test_every_schedule_of_a_pipeline_computes_what_one_process_does() -> None:
    case: dict[str, Keys] = {"dense": {**CASES["dense"], "num_layers": 4}}
    alone = run_distributed(train, 1, case, {})[0]
    for schedule in ("interleaved", "zero_bubble", "dualpipev"):
        layout = {**PIPELINE, "pipe_schedule": schedule, "gradient_accumulation_steps": 4}
        near(run_distributed(train, 2, case, layout)[0]["dense"], alone["dense"])


def test_a_resume_is_bitwise_and_other_layouts_take_the_state_over(tmp_path: Path) -> None:
    """Two tensor-parallel ranks save; they, two data-parallel ranks, ranks with half of the experts, and one go on."""
    full = run_distributed(train, 2, CASES, TENSOR, str(tmp_path))[0]
    again = run_distributed(train, 2, CASES, TENSOR, str(tmp_path), True)[0]
    other = run_distributed(train, 2, CASES, {}, str(tmp_path), True)[0]
    one = run_distributed(train, 1, CASES, {}, str(tmp_path), True)[0]
    mixtures = {name: case for name, case in CASES.items() if "experts" in name}
    spread = run_distributed(train, 2, mixtures, {"moe_expert_parallel_size": 2}, str(tmp_path), True)[0]
    for name in mixtures:
        near(spread[name], full[name][SAVED:])
    for name, curve in full.items():
        assert again[name] == curve[SAVED:]
        near(other[name], curve[SAVED:])
        near(one[name], curve[SAVED:])


def test_experts_of_several_ranks_in_fp32() -> None:
    """Muon's iterations are in bfloat16: one element of an update that is rounded otherwise moves a loss by 1e-5."""
    case = {"experts": {**MIXTURE, **APART, "precision": "fp32", "zero_optimization": {"stage": 0}}}
    alone = run_distributed(train, 1, case, {})[0]["experts"]
    spread = run_distributed(train, 2, case, {"moe_expert_parallel_size": 2})[0]["experts"]
    for at in (0, 1):
        assert [pair[at] for pair in spread] == pytest.approx([pair[at] for pair in alone], rel=2e-4)


def test_gradient_norms_of_all_parameters_add_up_to_the_norm(dataset: str, tmp_path: Path) -> None:
    keys = {"optimizer": CASES["dense"]["optimizer"], "precision": "bfloat16", "zero_optimization": {"stage": 1}}
    layout = {"model_parallel_size": 2, "log_grad_norm": True, "train_iters": 2, "eval_interval": 2, "eval_iters": 1}
    record = run(4, tmp_path, data_path=dataset, **keys, **layout)[-1]
    norms = [value for name, value in record.items() if name.startswith("gradient_norms/")]
    assert len(norms) > 20
    assert math.sqrt(sum(norm**2 for norm in norms)) == pytest.approx(record["train/grad_norm"], rel=1e-4)
