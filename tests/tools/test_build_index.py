"""Index maps built before a run are those that the run looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Resources, resolve
from megatron.data.dataset import index_cache
from tests.end_to_end.runs import BASE, NeverStop, make_dataset
from tools.build_index import main


@pytest.mark.parametrize(
    "changes",
    [
        {"train_iters": 3},
        {"train_iters": None, "train_samples": 20},
        {"train_iters": None, "train_samples": 24, "train_micro_batch_size_per_gpu": 4, "rampup_batch_size": [4, 4, 8]},
        {"train_iters": None, "train_epochs": 1, "pack_impl": "pack_until_overflow", "seq_length": 4000},
    ],
)
def test_a_run_finds_every_map(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.training import trainer

    settings = {**BASE, "data_path": make_dataset(tmp_path), "max_position_embeddings": 4000, **changes}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert main([str(tmp_path / "run.json"), "--world-size", "1"]) == 0
    built = capsys.readouterr().out.splitlines()
    assert len(built) == 3
    assert main([str(tmp_path / "run.json")]) == 0
    assert all(line.endswith("there already") for line in capsys.readouterr().out.splitlines())

    def missing(request: index_cache.IndexRequest) -> None:
        raise AssertionError(f"{request.stem} was not built before")

    monkeypatch.setattr(index_cache.IndexRequest, "build", missing)

    class Reached(Exception):
        """The data is there."""

    def stop(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(trainer, "find_checkpoint", stop)
    with pytest.raises(Reached):
        trainer.train(resolve([], settings, Resources(1)).config, NeverStop())


def test_issues_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**BASE, "data_path": str(tmp_path / "none")}))
    assert main([str(tmp_path / "run.json")]) == 2
    assert "cannot read the data file" in capsys.readouterr().err
