"""Norms, zeros, optimizer state and the noise scale: the same in every layout, and what they claim to be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.end_to_end.runs import run, series
from tests.layouts import Layout, pick

WATCHED = {
    "log_grad_norm": True,
    "log_grad_pct_zeros": True,
    "log_param_norm": True,
    "log_optimizer_states": True,
    "log_gradient_noise_scale": True,
    "gradient_noise_scale_n_batches": 2,
    "train_iters": 6,
    "eval_iters": 0,
    "no_weight_tying": False,
}
LAYOUTS: dict[str, Layout] = {
    **pick("tensor 2", "pipeline 2", "pipeline 2, tensor 2, ZeRO 1", "data 2, ZeRO 1", "data 2, ZeRO 3", "data 2"),
    "ZeRO 2, noise on the host": (2, {"zero_optimization": {"stage": 2}, "gradient_noise_scale_cpu_offload": True}),
}
QUICK = ("pipeline 2, tensor 2, ZeRO 1", "data 2, ZeRO 3")
FAMILIES = ("gradient_norms/", "gradient_zeros/", "parameter_norms/", "optimizer_state_norms/")


@pytest.fixture(scope="module")
def single(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return run(1, tmp_path_factory.mktemp("one"), data_path=dataset, **WATCHED)


def family(record: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


def test_they_add_up_to_what_is_known(single: list[dict[str, float]]) -> None:
    """The whole norm before clipping; Adam's two moments; rows of the embedding whose bytes never occurred."""
    for record in single:
        norms = family(record, "gradient_norms/")
        assert math.sqrt(sum(value**2 for value in norms.values())) == pytest.approx(
            record["train/grad_norm"], rel=1e-5
        )
        assert norms.keys() == family(record, "parameter_norms/").keys() == family(record, "gradient_zeros/").keys()
        states = family(record, "optimizer_state_norms/")
        assert states.keys() == {f"{key}.{name}" for key in norms for name in ("exp_avg", "exp_avg_sq")}
    first = single[0]
    assert first["train/grad_norm"] > 0.5, "clipping is active"
    factor = 0.5 / first["train/grad_norm"]
    for key, value in family(first, "gradient_norms/").items():
        moment = first[f"optimizer_state_norms/{key}.exp_avg"]
        assert moment == pytest.approx(0.1 * value * factor, rel=1e-4), key
    assert first["gradient_zeros/2.attention.dense.weight"] == 0.0
    assert len(series(single, "train/gradient_noise_scale")) == 5  # from the second step on
    assert len({round(value, 6) for value in series(single, "train/gradient_noise_scale")}) == 3


def compare(layout: str, single: list[dict[str, float]], dataset: str, folder: Path) -> None:
    world, settings = LAYOUTS[layout]
    records = run(world, folder, data_path=dataset, **WATCHED, **settings)
    for got, expected in zip(records, single, strict=True):
        for prefix in FAMILIES:
            assert family(got, prefix) == pytest.approx(family(expected, prefix), rel=2e-3, abs=1e-6), prefix
        if "train/gradient_noise_scale" in expected:
            scale = expected["train/gradient_noise_scale"]
            assert got["train/gradient_noise_scale"] == pytest.approx(scale, rel=2e-2)


@pytest.mark.parametrize("layout", QUICK)
def test_layouts_measure_alike(layout: str, single: list[dict[str, float]], dataset: str, tmp_path: Path) -> None:
    compare(layout, single, dataset, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_measure_alike(layout: str, single: list[dict[str, float]], dataset: str, tmp_path: Path) -> None:
    compare(layout, single, dataset, tmp_path)


def test_a_stop_between_two_reports_repeats_no_gradients(
    single: list[dict[str, float]], dataset: str, tmp_path: Path
) -> None:
    """The report of a stop has the steps since the last one, and no norms of a step before them."""
    found = run(1, tmp_path, data_path=dataset, **{**WATCHED, "log_interval": 4, "exit_interval": 5})
    assert [record["iteration"] for record in found] == [1, 4, 5]
    assert not family(found[2], "gradient_norms/") and not family(found[2], "gradient_zeros/")
    assert family(found[2], "parameter_norms/") == pytest.approx(family(single[4], "parameter_norms/"), rel=1e-5)
    assert found[2]["train/lm_loss"] == pytest.approx(single[4]["train/lm_loss"], rel=1e-5)


def test_layers_are_the_sums_of_their_parameters(single: list[dict[str, float]], dataset: str, tmp_path: Path) -> None:
    by_layer = run(1, tmp_path, data_path=dataset, **{**WATCHED, "train_iters": 1}, log_norms_by="layer")[0]
    sums: dict[str, float] = {}
    for key, value in family(single[0], "gradient_norms/").items():
        layer = f"layer_{key.partition('.')[0]}"
        sums[layer] = sums.get(layer, 0.0) + value**2
    expected = {layer: math.sqrt(value) for layer, value in sums.items()}
    assert family(by_layer, "gradient_norms/") == pytest.approx(expected, rel=1e-5)


def test_steps_leave_a_trace_that_chrome_opens(dataset: str, tmp_path: Path) -> None:
    settings = {"profile": True, "profile_step_start": 2, "profile_step_stop": 4, "train_iters": 4, "eval_iters": 0}
    run(2, tmp_path, data_path=dataset, pipe_parallel_size=2, **settings)
    for rank in range(2):
        trace = tmp_path / "logs" / "profile" / f"rank_0000{rank}_steps_2-3.json"
        events = json.loads(trace.read_text())["traceEvents"]
        assert any("aten::mm" in event.get("name", "") or "linear" in event.get("name", "") for event in events)


def test_perplexity_of_a_character(dataset: str, tmp_path: Path) -> None:
    """A token is a byte here, and nearly every byte a character, so both perplexities are nearly one."""
    records = run(2, tmp_path, data_path=dataset, train_iters=2, eval_interval=2, char_level_ppl=True)
    record = next(record for record in records if "validation/lm_loss" in record)
    loss, by_character = record["validation/lm_loss"], record["validation/lm_loss_char_lvl_ppl"]
    assert math.log(by_character) == pytest.approx(loss, rel=2e-2)
