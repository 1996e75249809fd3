"""However a run on CPUs ends, no shared memory of it stays on the host."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from megatron.shared_memory import FOLDER
from tests.end_to_end.runs import run as train_alone
from tests.end_to_end.test_failures import ROOT, Run

ENDINGS = ("done", "failed", "stopped", "rank killed", "launcher killed", "all killed")
LONG = [pytest.param(ending, ranks, marks=pytest.mark.long) for ending in ENDINGS for ranks in (1, 4)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def segments(port: int) -> list[str]:
    return [path.name for path in FOLDER.glob(f"deepspeed_*_{port}_*")]


def end(run: Run, ending: str) -> None:
    """Ends a run that trains."""
    launcher = psutil.Process(run.process.pid)
    below = launcher.children(recursive=True)
    workers = [each for each in below if "train.py" in " ".join(each.cmdline()[2:4])]
    if ending == "stopped":
        run.process.send_signal(signal.SIGTERM)
    elif ending == "rank killed":
        workers[0].kill()
    elif ending == "launcher killed":
        launcher.kill()
    elif ending == "all killed":
        for each in (launcher, *below):
            each.kill()
    run.process.wait(90)


@pytest.mark.parametrize(("ending", "ranks"), [*((ending, 2) for ending in ENDINGS), *LONG])
def test_no_segment_stays(ending: str, ranks: int, dataset: str, tmp_path: Path) -> None:
    port = free_port()
    settings = {"data_path": dataset, "num_gpus": ranks, "master_port": port, "train_batch_size": 8}
    if ending == "done":
        settings["train_iters"] = 2
    if ending == "failed":
        settings["data_path"] = str(tmp_path / "none")
    run = Run(tmp_path, settings)
    if ending in ("done", "failed"):
        run.process.wait(120)
    else:
        run.reach(1)
        assert segments(port) == []  # while it trains
        end(run, ending)
    deadline = time.monotonic() + 10  # ranks notice that a killed launcher is gone
    while segments(port) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert segments(port) == [], run.said()


@pytest.fixture(scope="module")
def saved(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    train_alone(1, folder, data_path=dataset, train_iters=1, eval_iters=0, save=str(folder), checkpoint_factor=1)
    return str(folder)


def used(script: str, folder: Path, port: int) -> bool:
    """Whether the model is at work."""
    if script == "generate.py":
        return (folder / "samples.jsonl").exists() and (folder / "samples.jsonl").stat().st_size > 0
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.long
@pytest.mark.parametrize("ending", ["stopped", "all killed"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("script", ["generate.py", "tools/run_text_generation_server.py"])
def test_no_segment_of_a_model_in_use_stays(script: str, ranks: int, ending: str, saved: str, tmp_path: Path) -> None:
    port, serving = free_port(), free_port()
    (tmp_path / "prompts.txt").write_text("def read(\n" * 5000)
    settings = {"load": saved, "num_gpus": ranks, "master_port": port, "serve_port": serving, "maximum_tokens": 20}
    settings |= {"model_parallel_size": min(ranks, 2), "sample_input_file": "prompts.txt"}
    run = Run(tmp_path, settings | {"sample_output_file": "samples.jsonl"}, str(ROOT / script))
    run.wait(lambda: used(script, tmp_path, serving))
    assert segments(port) == []
    end(run, ending)
    time.sleep(1.0)
    assert segments(port) == [], run.said()
