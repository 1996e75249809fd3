"""What a checkpoint means to a run: background saves, changed schedules, precisions and paddings, fallbacks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.format import layout
from tests.end_to_end.runs import run, series
from tests.end_to_end.test_precision import run_fp16
from tests.multi_rank import RankFailedError

SHORT: dict[str, Any] = {"train_iters": 8, "eval_interval": 8}


@pytest.fixture(scope="module")
def complete(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The records of one process that was not disturbed, over 20 steps."""
    return run(1, tmp_path_factory.mktemp("whole"), data_path=dataset)


def halves(dataset: str, save: Path, **settings: Any) -> dict[str, Any]:
    return {"data_path": dataset, "save": str(save), "load": str(save), "checkpoint_factor": 100, **settings}


def test_background_saves_resume_bitwise(dataset: str, tmp_path: Path) -> None:
    """Two ranks; saves every third step in the background, a stop in between, the last one complete before the exit."""
    settings = halves(dataset, tmp_path / "save", checkpoint_async=True, zero_optimization={"stage": 1})
    settings |= {"checkpoint_factor": 3, "keep_last_n_checkpoints": 2, "train_iters": 10}
    run(2, tmp_path / "parts", exit_interval=8, **settings)
    assert layout.iterations(tmp_path / "save") == [6, 8]
    assert (tmp_path / "save" / "latest").read_text() == "global_step8"
    resumed = run(2, tmp_path / "parts", **settings)
    complete = run(2, tmp_path / "whole", data_path=dataset, train_iters=10, zero_optimization={"stage": 1})
    for name in ("train/lm_loss", "train/grad_norm", "validation/lm_loss"):
        assert series(resumed, name) == series(complete, name), name


def test_checkpoints_of_a_run_that_went_on_before_are_not_rotated(dataset: str, tmp_path: Path) -> None:
    """They stay and do not count, until a save of the same iteration takes their place."""
    settings = halves(dataset, tmp_path / "save", train_iters=14, eval_iters=0)
    run(1, tmp_path / "first", **{**settings, "checkpoint_factor": 4}, exit_interval=11)
    assert layout.iterations(tmp_path / "save") == [4, 8, 11]
    again = {**settings, "checkpoint_factor": 3, "keep_last_n_checkpoints": 1}
    run(1, tmp_path / "second", **again, iteration=4, exit_interval=9)
    assert layout.iterations(tmp_path / "save") == [4, 8, 9, 11]
    run(1, tmp_path / "third", **again, iteration=4)
    assert layout.iterations(tmp_path / "save") == [4, 8, 11, 14]


def test_a_changed_schedule_is_refused_unless_asked_for(
    complete: list[dict[str, float]], dataset: str, tmp_path: Path
) -> None:
    settings = halves(dataset, tmp_path / "save")
    first = run(1, tmp_path / "parts", exit_interval=4, **settings)
    changed = {**settings, "min_lr": 5.0e-4, "lr_decay_iters": 40, "exit_interval": 8}
    with pytest.raises(RankFailedError, match=r"lr_decay_iters = 40: .* trained with 20; set override_lr_scheduler"):
        run(1, tmp_path / "refused", **changed)
    rates = "train/learning_rate"
    stored = run(1, tmp_path / "stored", **changed, use_checkpoint_lr_scheduler=True)
    own = run(1, tmp_path / "own", **{**changed, "iteration": 4}, override_lr_scheduler=True)
    assert series(stored, rates) == series(complete, rates)[4:8]
    assert series(own, rates)[0] > series(stored, rates)[0]
    assert len(series(first, rates)) == len(series(own, rates)) == 4


def test_precision_may_change_in_between(dataset: str, tmp_path: Path) -> None:
    """fp32 goes on in bfloat16 from the exact weights, and bfloat16 in fp32 from its fp32 copies."""
    zero = {**SHORT, "zero_optimization": {"stage": 1}}
    complete = series(run(1, tmp_path / "whole", data_path=dataset, **zero), "train/lm_loss")
    for first, second in (("fp32", "bfloat16"), ("bfloat16", "fp32")):
        settings = halves(dataset, tmp_path / first, **zero)
        run(1, tmp_path / f"{first} parts", exit_interval=4, precision=first, **settings)
        losses = series(run(1, tmp_path / f"{first} parts", precision=second, **settings), "train/lm_loss")
        assert losses == pytest.approx(complete, rel=2e-2)
        assert losses[4:] != complete[4:]


def test_the_previous_checkpoint_is_taken_and_the_run_ends_alike(
    complete: list[dict[str, float]], dataset: str, tmp_path: Path
) -> None:
    settings = halves(dataset, tmp_path / "save", checkpoint_factor=4)
    first = run(1, tmp_path / "parts", exit_interval=8, **settings)
    weights = tmp_path / "save" / "global_step8" / layout.model_file(0)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RankFailedError, match=r"its content changed after it was written.*load_fallback: previous"):
        run(1, tmp_path / "refused", **settings)
    resumed = run(1, tmp_path / "resumed", load_fallback="previous", **settings)
    assert series(resumed, "train/lm_loss") == series(complete, "train/lm_loss")[4:]
    assert series(first, "train/lm_loss") == series(complete, "train/lm_loss")[:8]


def test_the_vocabulary_keeps_its_padding(dataset: str, tmp_path: Path) -> None:
    """512 bytes padded to 640 rows on one rank would be 1280 rows on two: the model stays what it was."""
    settings = halves(dataset, tmp_path / "save", make_vocab_size_divisible_by=640, **SHORT)
    run(1, tmp_path / "parts", exit_interval=4, **settings)
    resumed = run(2, tmp_path / "parts", model_parallel_size=2, **settings)
    complete = run(1, tmp_path / "whole", data_path=dataset, make_vocab_size_divisible_by=640, **SHORT)
    assert series(resumed, "train/lm_loss") == pytest.approx(series(complete, "train/lm_loss"), rel=1e-5)


def test_iterations_that_pythia_saved(dataset: str, tmp_path: Path) -> None:
    """checkpoint_scale log with factor 2, and the start through extra_save_iters, from which a run can go on too."""
    settings = halves(dataset, tmp_path / "save", checkpoint_scale="log", extra_save_iters=[0, 12])
    complete = run(1, tmp_path / "parts", **{**settings, "checkpoint_factor": 2})
    assert layout.iterations(tmp_path / "save") == [0, 1, 2, 4, 8, 12, 16, 20]
    again = run(1, tmp_path / "again", data_path=dataset, load=str(tmp_path / "save"), iteration=0)
    assert series(again, "train/lm_loss") == series(complete, "train/lm_loss")


CHECKED: dict[str, Any] = {"checkpoint_validation_with_forward_pass": True, **SHORT}


@pytest.fixture(scope="module")
def retained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that stopped after step 4 and retained logits; to be copied."""
    folder = tmp_path_factory.mktemp("retained")
    settings = halves(dataset, folder / "save", **CHECKED)
    run(2, folder / "parts", exit_interval=4, zero_optimization={"stage": 1}, **settings)
    assert (folder / "save" / "global_step4" / layout.ANSWERS).is_file()
    return folder


@pytest.fixture(scope="module")
def unchecked(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two ranks that were not disturbed and retained nothing."""
    return series(run(2, tmp_path_factory.mktemp("unchecked"), data_path=dataset, **SHORT), "train/lm_loss")


@pytest.mark.parametrize(
    "target", [{}, {"model_parallel_size": 2}, {"pipe_parallel_size": 2}, {"zero_optimization": {"stage": 3}}]
)
def test_retained_logits_are_compared_in_any_layout(
    target: dict[str, Any], retained: Path, unchecked: list[float], dataset: str, tmp_path: Path
) -> None:
    """They change nothing in the run, and a model of other settings with the same tensors is reported."""
    shutil.copytree(retained, tmp_path, dirs_exist_ok=True)
    settings = halves(dataset, tmp_path / "save", **CHECKED)
    resumed = run(2, tmp_path / "parts", **{**settings, **target})
    assert series(resumed, "train/lm_loss") == pytest.approx(unchecked, rel=1e-5)
    with pytest.raises(RankFailedError, match=r"answers\.pt: the loaded model's logits differ"):
        run(2, tmp_path / "other", **{**settings, **target, "iteration": 4, "rotary_emb_base": 500})


def test_the_loss_scale_goes_on_where_it_was(dataset: str, tmp_path: Path) -> None:
    """fp16 from a scale that overflows, doubling soon: a stop while it falls and one between two doublings."""
    scaling = {"enabled": True, "initial_scale_power": 22, "hysteresis": 2, "loss_scale_window": 3}
    reported = {"data_path": dataset, "fp16": scaling, "train_iters": 16}
    complete = run_fp16(2, tmp_path / "whole", **reported)
    settings = halves(dataset, tmp_path / "save", **reported)
    for stop in (3, 11):
        run_fp16(2, tmp_path / "parts", exit_interval=stop, **settings)
    resumed = run_fp16(2, tmp_path / "parts", **settings)
    scales = series(complete, "train/loss_scale")
    assert len(set(scales)) > 3 and scales != sorted(scales, reverse=True), "it falls and rises"
    for name in ("train/loss_scale", "train/lm_loss", "train/learning_rate"):
        assert series(resumed, name) == series(complete, name), name


def test_parts_can_be_left_out_on_either_side(complete: list[dict[str, float]], dataset: str, tmp_path: Path) -> None:
    """no_save_*, no_load_*: what is not there is an error, unless it is not wanted; the data goes on where it was."""
    bare = halves(dataset, tmp_path / "bare", no_save_optim=True, no_save_rng=True)
    run(1, tmp_path / "bare parts", exit_interval=10, **bare)
    state = tmp_path / "bare" / "global_step10" / layout.STATE
    assert [path.name for path in state.iterdir()] == ["run.json"]
    with pytest.raises(RankFailedError, match=r"holds no optimizer state.*set no_load_optim"):
        run(1, tmp_path / "refused", **bare)
    full = halves(dataset, tmp_path / "full", hidden_dropout=0.1)
    run(1, tmp_path / "full parts", exit_interval=10, **full)
    anew = {"no_load_optim": True, "no_load_rng": True}
    first = series(complete, "train/lm_loss")[10]
    for settings in ({**bare, "no_load_optim": True}, {**full, **anew, "hidden_dropout": 0.0}):
        losses = series(run(1, tmp_path / "on", **{**settings, "save": None}), "train/lm_loss")[-10:]
        assert losses[1:] != series(complete, "train/lm_loss")[11:], "the optimizer began anew"
        if settings.get("no_save_optim"):
            assert losses[0] == first, "the weights and the samples are those of the undisturbed run"
    further = {**full, "save": None, "exit_interval": 11}
    drawn = [
        series(run(1, tmp_path / f"drawn {without}", **further, no_load_rng=without), "train/lm_loss")
        for without in (False, True)
    ]
    assert drawn[0] != drawn[1], "other dropout masks"


def test_stopping_by_number_and_by_time(dataset: str, tmp_path: Path) -> None:
    """exit_interval and exit_duration save at the step that they stop after, and the run is over without an error."""
    for name, value, last in (("exit_interval", 6, 6), ("exit_duration", 1e-9, 1)):
        save = tmp_path / name
        run(1, tmp_path, data_path=dataset, save=str(save), checkpoint_factor=100, **{name: value})
        assert layout.iterations(save) == [last]
        assert (save / layout.LATEST).read_text() == f"global_step{last}"
