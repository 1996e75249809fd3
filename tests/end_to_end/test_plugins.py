"""Parts from outside the tree are planned, trained and saved like built-in ones, by their registry entries alone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron.data.indexed.writer import DatasetWriter
from tests.architecture.source import ROOT
from tests.end_to_end import plugin
from tests.end_to_end.runs import BASE, run_rank
from tests.multi_rank import run_distributed

LENGTH, WIDTH, LAYERS, HEADS, ROWS, INNER = 32, 32, 2, 4, 128, 64
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def settings(folder: Path) -> dict[str, Any]:
    """A run of two ranks in which every part is one that the project does not know."""
    return {
        **{name: value for name, value in BASE.items() if name not in ("min_lr", "mlp_multiple_of", "num_kv_heads")},
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 3 * INNER,
        "norm": "dyt",
        "pos_emb": "both",
        "activation": "squared_glu",
        "optimizer": {"type": "signum", "params": {"lr": 1.0e-3, "momentum": 0.5}},
        "lr_decay_style": "quadratic",
        "warmup": 0.0,
        "tokenizer_type": "Nibbles",
        "train_impl": "halved",
        "sinks": ["lines"],
        "train_iters": 2,
        "lr_decay_iters": 3,
        "eval_interval": 2,
        "eval_iters": 1,
        "pipe_parallel_size": 1,
        "model_parallel_size": 2,
        "num_gpus": 2,
        "log_dir": str(folder / "logs"),
        "save": str(folder / "save"),
        "checkpoint_factor": 2,
        "data_path": str(folder / "text"),
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs deepy.py with the user's package on PYTHONPATH, and NEOX_PLUGINS as given."""
    plugin.write(tmp_path)
    with DatasetWriter(tmp_path / "text", numpy.dtype(numpy.uint16)) as writer:
        writer.add_document(numpy.random.default_rng(0).integers(0, 17, 8000).astype(numpy.uint16))
    (tmp_path / "conf.yml").write_text(json.dumps(settings(tmp_path)))

    def call(*flags: str, plugins: str = plugin.PLUGIN, code: str | None = None) -> subprocess.CompletedProcess[str]:
        chosen = ["-c", code] if code else [str(ROOT / "deepy.py"), "train.py", "conf.yml"]
        paths = os.pathsep.join([str(tmp_path), str(ROOT)])
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        return subprocess.run(
            [sys.executable, *chosen, *flags],
            cwd=tmp_path,
            env={**environment, "NEOX_PLUGINS": plugins},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    return call


def go_on(rank: int, world_size: int, folder: str, keys: dict[str, Any]) -> None:
    """A worker that finds the user's package."""
    sys.path.insert(0, folder)
    run_rank(rank, world_size, keys)


def test_unknown_parts_are_planned_trained_and_saved(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = run("--dry-run", "--json")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    report = json.loads(planned.stdout)
    assert report["not_supported_yet"] == []
    norms = (2 * LAYERS + 1) * (2 * WIDTH + 1)
    attention = LAYERS * (4 * WIDTH * WIDTH + 4 * WIDTH)
    inner = report["config"]["intermediate_size"] // 3
    mlps = LAYERS * (3 * WIDTH * inner + 2 * inner + WIDTH)
    positions = LENGTH * WIDTH + 8 * HEADS
    padded = 256  # 20 ids, to a multiple of 128 on each of two ranks
    count = norms + attention + mlps + positions + 2 * padded * WIDTH
    assert report["plan"]["parameters"] == count

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "logs" / "lines.txt").read_text().splitlines()
    rates = [float(line.split()[1]) for line in lines if not line.endswith("None")]
    assert rates == pytest.approx([1.0e-3 * (1 - position**2 / 9) for position in (1, 2)])
    records = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["train/lm_loss"] == pytest.approx(math.log(20) / 2, rel=0.05)

    saved = tmp_path / "save" / "global_step2"
    first = torch.load(saved / "layer_02-model_00-model_states.pt", weights_only=True)
    assert first["attention.rpe.bias"].shape == (8, HEADS // 2)
    assert first["attention.rpe.bias"].abs().max() > 0
    assert first["input_layernorm.alpha"].shape == (1,)
    embedding = torch.load(saved / "layer_00-model_00-model_states.pt", weights_only=True)
    assert embedding["position_embeddings.table"].shape == (LENGTH, WIDTH)

    monkeypatch.setenv("NEOX_PLUGINS", plugin.PLUGIN)
    other = {"model_parallel_size": 1, "zero_optimization": {"stage": 1}, "load": str(tmp_path / "save")}
    run_distributed(go_on, 2, str(tmp_path), {**settings(tmp_path), **other, "train_iters": 3})
    assert (tmp_path / "save" / "latest").read_text() == "global_step3"


def test_a_plugin_that_is_not_there_is_named_before_anything_starts(run: Run) -> None:
    refused = run("--dry-run", plugins="absent_parts")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "NEOX_PLUGINS = 'absent_parts'" in refused.stderr and "PYTHONPATH" in refused.stderr
    unknown = run("--dry-run", plugins="")
    assert unknown.returncode == 2 and "norm = 'dyt'" in unknown.stderr


def test_an_installed_package_registers_by_its_entry_point(run: Run, tmp_path: Path) -> None:
    metadata = tmp_path / "unknown-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: unknown\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[neox.plugins]\nparts = {plugin.PLUGIN}\n")
    names = "from megatron.registry import NORMS; import sys; print('dyt' in NORMS, 'torch' in sys.modules)"
    assert run(plugins="", code=names).stdout == "True False\n"
