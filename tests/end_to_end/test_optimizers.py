"""Every registered optimizer trains alike in every layout that the rules allow it, and goes on in another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.registry import EIGHT_BIT, OPTIMIZERS
from tests.end_to_end.runs import run, series
from tests.layouts import pick

ADAM = {"lr": 1.0e-3, "betas": [0.9, 0.95], "eps": 1.0e-6}
PARAMS: dict[str, dict[str, Any]] = {
    "adam": ADAM,
    "cpu_adam": ADAM,
    "cpu_torch_adam": ADAM,
    "onebitadam": {**ADAM, "freeze_step": 5},
    "sgd": {"lr": 0.05, "momentum": 0.9},
    "lion": {"lr": 3.0e-4},
    "madgrad_wd": {"lr": 1.0e-3},
    "sm3": {"lr": 0.05, "momentum": 0.9},
    "adafactor": {"lr": 0.01},
    "ademamix": {"lr": 1.0e-3, "beta3": 0.99},
    "schedulefree": {"lr": 5.0e-3},
    "soap": {"lr": 1.0e-3, "precondition_frequency": 2},
    "shampoo": {"lr": 1.0e-3, "precondition_frequency": 2, "start_step": 3, "block_size": 24},
    "muon": ADAM,
}
LAYOUTS = pick(
    "tensor 2",
    "pipeline 2",
    "data 2",
    "data 2, ZeRO 1",
    "data 2, ZeRO 2",
    "data 2, ZeRO 3",
    "pipeline 2, tensor 2, ZeRO 1",
)
QUICK = ("tensor 2", "data 2, ZeRO 3")
FLAT = frozenset({"full_tensors", "compressed_comm"})

# Relative deviation of ten losses. Lion's step is a sign and Muon works in bfloat16, so that a sum in another order
# now and then moves an element by a whole step; 1-bit Adam's momenta are signs too, and those of two data-parallel
# ranks are others than those of one (tests/optim/test_compressed_allreduce.py). The covariances of the first gradients
# have few eigenvalues above 0, and the rounding of sums chooses SOAP's basis of the rest. Shampoo
# divides by their roots.
TOLERANCE = {"lion": 2e-4, "muon": 2e-4, "onebitadam": 1e-4, "soap": 1e-3, "shampoo": 5e-4}
STEPS = {"train_iters": 10, "eval_interval": 10, "eval_iters": 1}


def legal(name: str, layout: str) -> bool:
    traits = OPTIMIZERS.entry(name).traits
    if "ZeRO" in layout:
        return not traits & FLAT
    return not (name == "onebitadam" and layout == "data 2")


ALL = [(name, layout) for name in OPTIMIZERS.names for layout in LAYOUTS if legal(name, layout)]
SHARDED = ("adam", "cpu_adam", "lion", "adafactor", "muon")
"""Tried under ZeRO 3 each time; the others have states of the same forms."""
DEFAULT = [(name, layout) for name, layout in ALL if layout in QUICK and ("ZeRO" not in layout or name in SHARDED)]
RESUMED = ("adam", "cpu_adam", "onebitadam", "sm3", "adafactor", "soap", "shampoo", "schedulefree", "muon")
"""The states of the others are among theirs: one or two tensors of the parameter's shape."""


@pytest.fixture(scope="module")
def single(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of one process, by optimizer; filled as they are asked for."""
    return {}


def chosen(name: str) -> dict[str, Any]:
    return {"type": name, "params": PARAMS[name]}


def losses(name: str, world: int, folder: Path, dataset: str, **settings: Any) -> list[float]:
    records = run(world, folder, data_path=dataset, optimizer=chosen(name), **{**STEPS, **settings})
    return series(records, "train/lm_loss")


def compare(name: str, layout: str, dataset: str, single: dict[str, list[float]], folder: Path) -> None:
    if name not in single:
        single[name] = losses(name, 1, folder / "one", dataset)
    world, settings = LAYOUTS[layout]
    got = losses(name, world, folder / "many", dataset, **settings)
    assert got == pytest.approx(single[name], rel=TOLERANCE.get(name, 1e-5))
    assert got[-1] < got[0] - 0.1


@pytest.mark.parametrize(("name", "layout"), DEFAULT)
def test_layouts_compute_what_one_process_does(
    name: str, layout: str, dataset: str, single: dict[str, list[float]], tmp_path: Path
) -> None:
    compare(name, layout, dataset, single, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("name", "layout"), ALL)
def test_all_layouts_compute_what_one_process_does(
    name: str, layout: str, dataset: str, single: dict[str, list[float]], tmp_path: Path
) -> None:
    compare(name, layout, dataset, single, tmp_path)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_in_another_layout(
    name: str, dataset: str, single: dict[str, list[float]], tmp_path: Path
) -> None:
    """From one process to two tensor-parallel ranks and back: the losses of an uninterrupted run."""
    if name not in single:
        single[name] = losses(name, 1, tmp_path / "one", dataset)
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    losses(name, 1, tmp_path / "parts", dataset, exit_interval=3, **saved)
    losses(name, 2, tmp_path / "parts", dataset, exit_interval=7, model_parallel_size=2, **saved)
    got = losses(name, 1, tmp_path / "parts", dataset, **saved)
    assert got == pytest.approx(single[name], rel=TOLERANCE.get(name, 1e-5))


def test_one_bit_adam_keeps_its_errors_over_two_data_ranks(dataset: str, tmp_path: Path) -> None:
    """Stopped in the middle of compressed training and resumed: bitwise the uninterrupted run. One rank goes on too."""
    settings = {"name": "onebitadam", "dataset": dataset}
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    full = losses(world=2, folder=tmp_path / "whole", **settings)
    losses(world=2, folder=tmp_path / "parts", exit_interval=8, **saved, **settings)
    assert losses(world=2, folder=tmp_path / "parts", **{**saved, "save": None}, **settings) == full
    alone = losses(world=1, folder=tmp_path / "alone", **saved, **settings)
    assert alone == pytest.approx(full[8:], rel=2e-2)


@pytest.mark.parametrize("name", EIGHT_BIT.names)
def test_eight_bit_state_resumes_and_trains_on_the_way_of_thirty_two(
    name: str, dataset: str, single: dict[str, list[float]], tmp_path: Path
) -> None:
    if name not in single:
        single[name] = losses(name, 1, tmp_path / "one", dataset)
    low = {"use_bnb_optimizer": True, "zero_optimization": {"stage": 1}}
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    full = losses(name, 2, tmp_path / "whole", dataset, **low)
    losses(name, 2, tmp_path / "parts", dataset, exit_interval=5, **low, **saved)
    resumed = losses(name, 2, tmp_path / "parts", dataset, **low, **saved)
    assert resumed == pytest.approx(full, rel=1e-6)  # the scale of a block comes back to its last bit but one
    assert full == pytest.approx(single[name], rel=2e-2)


def test_a_moving_average_is_evaluated_beside_the_weights_and_resumed(dataset: str, tmp_path: Path) -> None:
    """Training is the same bit by bit with and without it; a resume goes on with the stored average."""
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    settings = {"data_path": dataset, "optimizer": chosen("adam"), **STEPS, "eval_interval": 5}
    plain = run(1, tmp_path / "plain", **settings)
    full = run(1, tmp_path / "full", ema_decay=0.8, **settings)
    run(1, tmp_path / "parts", ema_decay=0.8, exit_interval=4, **saved, **settings)
    resumed = run(1, tmp_path / "parts", ema_decay=0.8, **saved, **settings)
    for split in ("train", "validation"):
        assert series(full, f"{split}/lm_loss") == series(plain, f"{split}/lm_loss")
    assert series(resumed, "validation_ema/lm_loss") == series(full, "validation_ema/lm_loss")
    averaged, own = series(full, "validation_ema/lm_loss")[-1], series(full, "validation/lm_loss")[-1]
    assert own + 0.05 < averaged < series(plain, "train/lm_loss")[0]
    assert not any("validation_ema/lm_loss" in record for record in plain)
