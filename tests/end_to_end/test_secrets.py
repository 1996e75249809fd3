"""A secret of the configuration does not leave the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.runs import BASE, make_dataset, run_files

KEY = "hunter2-is-no-key"


def test_checkpoints_and_metrics_services_do_not_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    values = {**BASE, "train_iters": 1, "data_path": make_dataset(tmp_path), "serve_key": KEY}
    own = {"use_wandb": True, "checkpoint_factor": 1, "save": str(tmp_path / "run" / "saved")}
    (tmp_path / "a.yml").write_text(json.dumps({**values, **own}))
    run_files([tmp_path / "a.yml"], 1, tmp_path / "run")
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"resolved.json", "a.yml"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" and b"train_iters" in path.read_bytes() for path in written)
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
