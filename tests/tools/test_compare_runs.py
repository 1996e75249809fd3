"""The first difference of two runs is found, on the rank, layer and iteration where it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.metrics.fingerprint import Fingerprints, read_fingerprints
from tests.end_to_end.runs import BASE, run_rank_of_many
from tests.multi_rank import run_cases
from tools.compare_runs import main

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2, "checkpoint_activations": True},
    "pipeline": {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
}


def disturbed(rank: int, world_size: int, settings: dict[str, Any], where: tuple[int, int, int] | None) -> None:
    """A run in which one rank adds a little to the output of one block from the second iteration on.

    where: the rank, the block, and the passes of one iteration.
    """
    with pytest.MonkeyPatch.context() as patch:
        if where is not None and where[0] == rank:
            from megatron.model.block import TransformerBlock

            forward, calls = TransformerBlock.forward, []

            def wrong(self: TransformerBlock, *inputs: Any) -> torch.Tensor:
                out = forward(self, *inputs)
                if self.attention.number != where[1]:
                    return out
                calls.append(None)
                return out if len(calls) <= where[2] else out * 1.001

            patch.setattr(TransformerBlock, "forward", wrong)
        run_rank_of_many(rank, world_size, settings)


PASSES = {"tensor": 1, "pipeline": 2, "ZeRO 3": 1}


@pytest.fixture(scope="module")
def runs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs of each layout: right, again the same, and wrong."""
    folder = tmp_path_factory.mktemp("runs")
    keys = {**BASE, "data_path": dataset, "train_iters": 3, "fingerprint_interval": 1, "eval_iters": 0}
    cases = {
        (layout, name): (disturbed, {**keys, **settings, "log_dir": str(folder / layout / name)}, where)
        for layout, settings in LAYOUTS.items()
        for name, where in {"right": None, "again": None, "wrong": (1, 2, PASSES[layout])}.items()
    }
    run_cases(cases, 2, timeout=300)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_position_is_found(layout: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, again, wrong = (runs / layout / name for name in ("right", "again", "wrong"))
    assert main([str(right), str(again)]) == 0
    assert "fingerprints agree" in capsys.readouterr().out
    assert main([str(right), str(wrong)]) == 1
    reported = capsys.readouterr().out.splitlines()[0]
    assert reported.startswith("first difference: rank 1, iteration 2, micro batch 0, layer 4: activation with norm")
    assert "1.0e-03 apart" in reported
    assert main([str(right), str(wrong), "--tolerance", "0.5"]) == 0


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert "there are no fingerprints; run with fingerprint_interval: 1" in capsys.readouterr().err
    for name, ranks in (("one", 1), ("two", 2)):
        for rank in range(ranks):
            with Fingerprints(tmp_path / name, rank, 1, {}, {"2.w": torch.nn.Parameter(torch.ones(3))}).recording(1):
                pass
    assert main([str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert "the runs have 1 and 2 ranks" in capsys.readouterr().err


def test_records(tmp_path: Path) -> None:
    """Only every interval-th iteration; weights, then what goes forward, then what comes back."""
    layer = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(layer.weight)
    prints = Fingerprints(tmp_path, 3, 2, {5: layer}, {"5.weight": layer.weight})
    for iteration in (1, 2):
        with prints.recording(iteration):
            layer(torch.tensor([3.0, 4.0])).sum().backward()
    layer(torch.ones(2))
    (rank, records), *_ = read_fingerprints(tmp_path).items()
    assert rank == 3
    reported = [(record["iteration"], record["what"], record["layer"], record["norm"]) for record in records]
    root = pytest.approx(2**0.5)
    assert reported == [(2, "weights", "5.weight", root), (2, "activation", "5", 5.0), (2, "gradient", "5", root)]
