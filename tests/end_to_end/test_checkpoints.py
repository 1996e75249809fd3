"""What a checkpoint means to a run: background saves, changed schedules, precisions and paddings, fallbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint import layout
from tests.distributed import RankFailedError
from tests.end_to_end.runs import make_dataset, run, series


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


def halves(dataset: str, save: Path, **settings: Any) -> dict[str, Any]:
    return {"data_path": dataset, "save": str(save), "load": str(save), "checkpoint_factor": 100, **settings}


def test_background_saves_resume_bitwise(dataset: str, tmp_path: Path) -> None:
    """Two ranks; saves every third step in the background, a stop in between, the last one complete before the exit."""
    settings = halves(dataset, tmp_path / "save", checkpoint_async=True, zero_optimization={"stage": 1})
    settings |= {"checkpoint_factor": 3, "keep_last_n_checkpoints": 2}
    run(2, tmp_path / "parts", exit_interval=8, **settings)
    assert layout.iterations(tmp_path / "save") == [6, 8]
    assert (tmp_path / "save" / "latest").read_text() == "global_step8"
    resumed = run(2, tmp_path / "parts", **settings)
    whole = run(2, tmp_path / "whole", data_path=dataset, zero_optimization={"stage": 1})
    for name in ("train/lm_loss", "train/grad_norm", "validation/lm_loss"):
        assert series(resumed, name) == series(whole, name), name


def test_a_changed_schedule_is_refused_unless_asked_for(dataset: str, tmp_path: Path) -> None:
    settings = halves(dataset, tmp_path / "save")
    first = run(1, tmp_path / "parts", exit_interval=4, **settings)
    changed = {**settings, "min_lr": 5.0e-4, "lr_decay_iters": 40, "exit_interval": 8}
    with pytest.raises(RankFailedError, match=r"lr_decay_iters = 40: .* trained with 20; set override_lr_scheduler"):
        run(1, tmp_path / "refused", **changed)
    rates = "train/learning_rate"
    stored = run(1, tmp_path / "stored", **changed, use_checkpoint_lr_scheduler=True)
    own = run(1, tmp_path / "own", **{**changed, "iteration": 4}, override_lr_scheduler=True)
    whole = run(1, tmp_path / "whole", data_path=dataset)
    assert series(stored, rates) == series(whole, rates)[4:8]
    assert series(own, rates)[0] > series(stored, rates)[0]
    assert len(series(first, rates)) == len(series(own, rates)) == 4


def test_precision_may_change_in_between(dataset: str, tmp_path: Path) -> None:
    """fp32 goes on in bfloat16 from the exact weights, and bfloat16 in fp32 from its fp32 copies."""
    zero = {"zero_optimization": {"stage": 1}}
    whole = series(run(1, tmp_path / "whole", data_path=dataset, **zero), "train/lm_loss")
    for first, second in (("fp32", "bfloat16"), ("bfloat16", "fp32")):
        settings = halves(dataset, tmp_path / first, **zero)
        run(1, tmp_path / f"{first} parts", exit_interval=10, precision=first, **settings)
        losses = series(run(1, tmp_path / f"{first} parts", precision=second, **settings), "train/lm_loss")
        assert losses == pytest.approx(whole, rel=2e-2)
        assert losses[10:] != whole[10:]


def test_the_previous_checkpoint_is_taken_and_the_run_ends_alike(dataset: str, tmp_path: Path) -> None:
    settings = halves(dataset, tmp_path / "save", checkpoint_factor=4)
    first = run(1, tmp_path / "parts", exit_interval=8, **settings)
    weights = tmp_path / "save" / "global_step8" / layout.model_file(0)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RankFailedError, match=r"its content changed after it was written.*load_fallback: previous"):
        run(1, tmp_path / "refused", **settings)
    resumed = run(1, tmp_path / "resumed", load_fallback="previous", **settings)
    whole = run(1, tmp_path / "whole", data_path=dataset)
    assert series(resumed, "train/lm_loss") == series(whole, "train/lm_loss")[4:]
    assert series(first, "train/lm_loss") == series(whole, "train/lm_loss")[:8]


def test_the_vocabulary_keeps_its_padding(dataset: str, tmp_path: Path) -> None:
    """512 bytes padded to 640 rows on one rank would be 1280 rows on two: the model stays what it was."""
    settings = halves(dataset, tmp_path / "save", make_vocab_size_divisible_by=640)
    run(1, tmp_path / "parts", exit_interval=5, **settings)
    resumed = run(2, tmp_path / "parts", model_parallel_size=2, **settings)
    whole = run(1, tmp_path / "whole", data_path=dataset, make_vocab_size_divisible_by=640)
    assert series(resumed, "train/lm_loss") == pytest.approx(series(whole, "train/lm_loss"), rel=1e-5)


def test_iterations_that_pythia_saved(dataset: str, tmp_path: Path) -> None:
    """checkpoint_scale log with factor 2, and the start through extra_save_iters."""
    settings = halves(dataset, tmp_path / "save", checkpoint_scale="log", extra_save_iters=[0, 12])
    run(1, tmp_path / "parts", **{**settings, "checkpoint_factor": 2})
    assert layout.iterations(tmp_path / "save") == [0, 1, 2, 4, 8, 12, 16, 20]
