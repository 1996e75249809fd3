"""A run that was stopped or killed and resumed is the run that was not, bit by bit; any layout continues any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import run, series
from tests.multi_rank import RankFailedError

EXACT = ("train/lm_loss", "train/learning_rate", "train/grad_norm", "validation/lm_loss", "consumed_tokens")
ZERO = {"stage": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor 2 with dropout, accumulation 2": (
        2,
        {
            "model_parallel_size": 2,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "gradient_accumulation_steps": 2,
        },
    ),
    "pipeline 2": (2, {"pipe_parallel_size": 2}),
    "data 2, ZeRO 1, bfloat16": (2, {"zero_optimization": ZERO, "precision": "bfloat16"}),
    "data 2, ZeRO 3": (2, {"zero_optimization": {"stage": 3}}),
}
SHORT: dict[str, Any] = {"train_iters": 9, "eval_interval": 4}
SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, pipeline 2, ZeRO 1": (
        4,
        {"model_parallel_size": 2, "pipe_parallel_size": 2, "zero_optimization": ZERO},
    ),
    "data 2, ZeRO 3": (2, {"zero_optimization": {"stage": 3}}),
}
OTHER_LAYOUTS = {
    "one process": (1, {}),
    "tensor 2": (2, {"model_parallel_size": 2}),
    "pipeline 2": (2, {"pipe_parallel_size": 2}),
    "data 2, ZeRO 2": (2, {"zero_optimization": {"stage": 2}}),
}


def in_folder(folder: Path) -> dict[str, Any]:
    """Saves there when it ends, and goes on from there."""
    return {"save": str(folder / "save"), "load": str(folder / "save"), "checkpoint_factor": 100}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_resumes_change_nothing(layout: str, dataset: str, tmp_path: Path) -> None:
    world_size, settings = LAYOUTS[layout]
    full = run(world_size, tmp_path / "whole", data_path=dataset, **SHORT, **settings)
    parts = {"data_path": dataset, **in_folder(tmp_path), **SHORT, **settings}
    run(world_size, tmp_path / "parts", exit_interval=3, **parts)
    run(world_size, tmp_path / "parts", exit_interval=6, **parts)
    resumed = run(world_size, tmp_path / "parts", **parts)
    for name in EXACT:
        assert series(resumed, name) == series(full, name), name
    assert len(series(resumed, "train/lm_loss")) == 9


@pytest.fixture(scope="module")
def full(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The records of one process that was not disturbed."""
    return run(1, tmp_path_factory.mktemp("whole"), data_path=dataset, **SHORT)


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that stopped after step 4, in one layout; to be copied."""
    folder = tmp_path_factory.mktemp("source")
    world_size, settings = SOURCES[request.param]
    run(world_size, folder / "parts", data_path=dataset, exit_interval=4, **in_folder(folder), **SHORT, **settings)
    return folder


@pytest.mark.parametrize("target", OTHER_LAYOUTS)
def test_any_layout_continues_any_other(
    source: Path, target: str, dataset: str, full: list[dict[str, float]], tmp_path: Path
) -> None:
    """Saved in one layout at step 4, continued in another: the losses of the undisturbed run to 1e-5."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    world_size, settings = OTHER_LAYOUTS[target]
    parts = {"data_path": dataset, **in_folder(tmp_path), **SHORT, **settings}
    continued = run(world_size, tmp_path / "parts", **parts)
    assert series(continued, "train/lm_loss") == pytest.approx(series(full, "train/lm_loss"), rel=1e-5)
    assert series(continued, "train/grad_norm") == pytest.approx(series(full, "train/grad_norm"), rel=1e-4)


@pytest.fixture(scope="module")
def two_steps(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of two steps; to be loaded from."""
    folder = tmp_path_factory.mktemp("two")
    run(1, folder, data_path=dataset, save=str(folder / "save"), checkpoint_factor=2, train_iters=2)
    return folder / "save"


def test_load_that_points_nowhere_is_refused(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="there is no such folder; correct the path"):
        run(1, tmp_path, data_path=dataset, load=str(tmp_path / "nothing"))


def test_an_iteration_that_was_not_saved_is_refused(two_steps: Path, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=r"no such checkpoint.*choose one with --iteration: 2"):
        run(1, tmp_path, data_path=dataset, load=str(two_steps), iteration=3)


def test_a_checkpoint_of_another_shape_is_refused(two_steps: Path, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(
        RankFailedError, match=r"tensor 0\.word_embeddings\.weight has shape \[512, 64\], the model's is"
    ):
        run(1, tmp_path, data_path=dataset, load=str(two_steps), hidden_size=32, override_lr_scheduler=True)


def test_finetune_takes_the_weights_and_starts_counting_anew(dataset: str, tmp_path: Path) -> None:
    save = str(tmp_path / "save")
    first = run(1, tmp_path / "first", data_path=dataset, save=save, checkpoint_factor=20)
    tuned = run(1, tmp_path / "tuned", data_path=dataset, load=save, finetune=True, eval_iters=0)
    assert [record["iteration"] for record in tuned if "train/lm_loss" in record] == list(range(1, 21))
    assert series(tuned, "train/lm_loss")[0] < series(first, "train/lm_loss")[0] - 1.0


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 7},
    "seq_length": {"seq_length": 16},
    "pack_impl": {"pack_impl": "pack_until_overflow"},
    "train_iters": {"train_iters": 4000, "override_lr_scheduler": True},
    "data_path": {"split": "80,10,10"},
}


@pytest.fixture(scope="module")
def three_steps(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that stopped after step 3; to be copied."""
    folder = tmp_path_factory.mktemp("three")
    run(1, folder / "parts", exit_interval=3, data_path=dataset, **in_folder(folder))
    return folder


@pytest.mark.parametrize("key", CHANGES)
def test_a_resume_that_would_read_other_samples_is_refused(
    key: str, three_steps: Path, dataset: str, tmp_path: Path
) -> None:
    shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True)
    parts = {"data_path": dataset, **in_folder(tmp_path)}
    with pytest.raises(RankFailedError, match=rf"{key}.*override_data_order"):
        run(1, tmp_path / "parts", **{**parts, **CHANGES[key]})
    on = run(1, tmp_path / "parts", exit_interval=4, override_data_order=True, **{**parts, **CHANGES[key]})
    assert series(on, "iteration")[-1] == 4


def test_a_smaller_batch_from_here_on_reads_as_far_as_train_samples(dataset: str, tmp_path: Path) -> None:
    save = str(tmp_path / "save")
    parts = {"data_path": dataset, "save": save, "load": save, "checkpoint_factor": 100, "train_iters": None}
    run(1, tmp_path / "parts", exit_interval=3, train_samples=48, train_batch_size=8, **parts)
    on = run(1, tmp_path / "parts", train_samples=48, train_batch_size=4, **parts)
    assert series(on, "iteration")[-1] == 3 + (48 - 3 * 8) // 4


def test_a_smaller_batch_from_here_on_does_not_run_out_of_samples(dataset: str, tmp_path: Path) -> None:
    save = str(tmp_path / "save")
    parts = {"data_path": dataset, "save": save, "load": save, "checkpoint_factor": 100, "pack_impl": "unpacked"}
    run(1, tmp_path / "parts", exit_interval=3, train_iters=8, train_batch_size=16, **parts)
    on = run(1, tmp_path / "parts", train_iters=8, train_batch_size=4, **parts)
    assert series(on, "iteration")[-1] == 8


def test_data_that_moved_are_the_same_data(three_steps: Path, dataset: str, tmp_path: Path) -> None:
    shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"moved{suffix}").write_bytes(Path(f"{dataset}{suffix}").read_bytes())
    on = run(1, tmp_path / "parts", exit_interval=4, data_path=str(tmp_path / "moved"), **in_folder(tmp_path))
    assert series(on, "iteration")[-1] == 4


def test_a_second_run_does_not_replace_the_checkpoints_of_the_first(dataset: str, tmp_path: Path) -> None:
    save = tmp_path / "save"
    parts = {"data_path": dataset, "save": str(save), "checkpoint_factor": 2, "train_iters": 4}
    run(1, tmp_path / "first", **parts)
    before = (save / "global_step4" / "manifest.json").read_bytes()
    with pytest.raises(RankFailedError, match=r"save.*checkpoints of another run \(iterations 2, 4\)"):
        run(1, tmp_path / "second", **{**parts, "seed": 99})
    base = str(tmp_path / "base")
    run(1, tmp_path / "base-run", **{**parts, "save": base})
    with pytest.raises(RankFailedError, match=r"save.*checkpoints of another run"):
        run(1, tmp_path / "tuned", **parts, load=base, finetune=True)
    assert (save / "global_step4" / "manifest.json").read_bytes() == before
    run(1, tmp_path / "third", **{**parts, "save_overwrite": True, "train_iters": 2})
    assert [path.name for path in save.glob("global_step*")] == ["global_step2"]


def test_a_run_of_no_steps_saves_the_untrained_model(dataset: str, tmp_path: Path) -> None:
    save = tmp_path / "save"
    settings = {"data_path": dataset, "extra_save_iters": [0], "train_iters": 0, "lr_decay_iters": 10}
    records = run(1, tmp_path, save=str(save), **settings)
    assert (save / "latest").read_text() == "global_step0"
    assert len(series(records, "validation/lm_loss")) == 1


def test_one_checkpoint_is_not_the_folder_of_a_run(two_steps: Path, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=r"this is one checkpoint.*set load: \S*/save and iteration: 2"):
        run(1, tmp_path, data_path=dataset, load=str(two_steps / "global_step2"))


def test_the_first_part_starts_where_load_is_the_save_folder_by_another_name(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "save")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(
            1, tmp_path, data_path=dataset, save="save", load=str(tmp_path / "link"), checkpoint_factor=2, train_iters=2
        )
    assert (tmp_path / "save" / "latest").read_text() == "global_step2"


def test_exit_at_the_last_step_is_the_end_of_the_run(dataset: str, tmp_path: Path) -> None:
    records = run(1, tmp_path, data_path=dataset, train_iters=4, exit_interval=4)
    assert series(records, "test/lm_loss")
