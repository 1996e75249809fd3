"""The real Slurm: srun and sbatch train, go on, are cancelled and requeued, with and without deepy.py."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.runs import run, series
from tests.examples.scripts import EXAMPLES, SMALL, flags, write_text
from tests.system.slurm import Slurm, cluster
from tests.system.training import (
    DEEPY,
    ENDLESS,
    ROOT,
    SCHEDULE,
    TRAIN,
    last_saved,
    losses,
    stopped_after,
    wait_until_saved,
    write,
)

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def submit(slurm: Slurm, folder: Path, *command: str) -> str:
    """A batch job on both nodes that goes where it is requeued; returns its number."""
    lines = ["#!/bin/bash", "#SBATCH --nodes=2 --ntasks-per-node=1 --requeue", "#SBATCH --output=job.txt"]
    (folder / "job.sh").write_text("\n".join([*lines, "#SBATCH --open-mode=append", " ".join(command)]) + "\n")
    return re.findall(r"\d+", slurm.call("sbatch", "job.sh", cwd=folder))[0]


def test_srun_without_deepy_trains_and_goes_on(
    slurm: Slurm, dataset: str, undisturbed: list[float], tmp_path: Path
) -> None:
    write(tmp_path, dataset)
    slurm.call("srun", "--nodes=2", *TRAIN, "--exit-interval", "10", cwd=tmp_path)
    assert last_saved(tmp_path) == 10
    slurm.call("srun", "--nodes=2", *TRAIN, cwd=tmp_path)
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-6)


def test_a_cancelled_job_has_saved(slurm: Slurm, dataset: str, tmp_path: Path) -> None:
    write(tmp_path, dataset, train_iters=ENDLESS)
    job = submit(slurm, tmp_path, "srun", *TRAIN)
    wait_until_saved(tmp_path)
    slurm.call("scancel", job, cwd=tmp_path)
    slurm.wait(job, "CANCELLED")
    said = _grown(tmp_path / "job.txt", "stopped after iteration ")
    assert last_saved(tmp_path) == stopped_after(said)


def test_a_requeued_job_goes_on(slurm: Slurm, dataset: str, tmp_path: Path) -> None:
    """`load` is not given: that Slurm has started the job before is enough to go on. Only the second start ends."""
    write(tmp_path, dataset, load=None, train_iters=ENDLESS)
    job = submit(slurm, tmp_path, "srun", *TRAIN, "${SLURM_RESTART_COUNT:+--exit-interval 20}")
    wait_until_saved(tmp_path)
    slurm.call("scontrol", "requeue", job, cwd=tmp_path)
    slurm.wait(job, "COMPLETED", seconds=180)
    said = (tmp_path / "job.txt").read_text()
    assert "stopped after iteration" in said.partition("JOB REQUEUE")[2]
    assert last_saved(tmp_path) % 20 == 0
    # The order of the data follows from train_iters.
    endless = {**SCHEDULE, "train_iters": ENDLESS, "exit_interval": 20}
    full = series(run(2, tmp_path / "whole", data_path=dataset, **endless), "train/lm_loss")
    assert losses(tmp_path)[:20] == pytest.approx(full, rel=1e-6)


def test_deepy_in_a_batch_job_uses_the_nodes_of_the_job(
    slurm: Slurm, dataset: str, undisturbed: list[float], tmp_path: Path
) -> None:
    write(tmp_path, dataset, launcher="slurm", comment="two nodes")
    job = submit(slurm, tmp_path, *DEEPY)
    slurm.wait(job, "COMPLETED", "FAILED")
    said = (tmp_path / "job.txt").read_text()
    assert slurm.state(job) == "COMPLETED", said
    assert "2 ranks = no pipeline x data 2 x tensor 1" in said
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-6)
    for rank in (0, 1):
        assert (tmp_path / "save" / "logs" / f"rank_{rank}.log").is_file()


def test_deepy_outside_of_a_job_gets_nodes_and_answers_signals(slurm: Slurm, dataset: str, tmp_path: Path) -> None:
    write(tmp_path, dataset, launcher="slurm", num_nodes=2, num_gpus=1, train_iters=ENDLESS)
    with (tmp_path / "said.txt").open("wb") as said:
        process = subprocess.Popen(DEEPY, cwd=tmp_path, env=slurm.environment, stdout=said, stderr=said)
    wait_until_saved(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, (tmp_path / "said.txt").read_text()
    text = (tmp_path / "said.txt").read_text()
    assert "SIGTERM: the workers save and stop" in text
    assert last_saved(tmp_path) == stopped_after(text)
    assert slurm.call("squeue", "-h", cwd=tmp_path) == ""


def test_a_failing_rank_is_named_with_its_node(slurm: Slurm, dataset: str, tmp_path: Path) -> None:
    write(tmp_path, str(tmp_path / "nothing"), launcher="slurm", num_nodes=2, num_gpus=1)
    done = subprocess.run(
        DEEPY, cwd=tmp_path, env=slurm.environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (1, 2)
    assert str(tmp_path / "nothing") in done.stderr
    assert slurm.call("squeue", "-h", cwd=tmp_path) == ""


def test_the_pythia_example_prepares_trains_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    """Both scripts as they stand, but for nodes, tasks and GPUs, which a cluster of two small nodes does not have."""
    write_text(tmp_path / "text" / "one.jsonl", 20)
    write_text(tmp_path / "text" / "two.jsonl", 30)
    for name in ("prepare-data.sbatch", "train.sbatch"):
        script = (EXAMPLES / "pythia_slurm" / name).read_text()
        sized = re.sub(r"#SBATCH --nodes=4 .*", "#SBATCH --nodes=2 --ntasks-per-node=1", script)
        (tmp_path / name).write_text(sized)
    small = {**SMALL, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "lr_decay_iters": 20}
    small |= {"vocab_size": 500, "attention_config": [[["flash"], 2]], "num_workers": 0, "extra_save_iters": [5]}
    environment = {"NEOX": str(ROOT), "WORK": str(tmp_path / "work"), "TEXT": str(tmp_path / "text")}
    here = Slurm({**slurm.environment, **environment, "TOKENS": "500", "RANKS": "2"})
    job = here.call("sbatch", "--parsable", "prepare-data.sbatch", *flags(small), cwd=tmp_path).strip()
    here.wait(job, "COMPLETED", "FAILED", seconds=240)
    said = next(tmp_path.glob(f"pythia-data-{job}.txt")).read_text()
    assert here.state(job) == "COMPLETED", said
    assert len(list((tmp_path / "work" / "shards").glob("*.idx"))) == 2
    for more in (["--exit-interval", "10"], []):
        job = here.call("sbatch", "--parsable", "train.sbatch", *flags(small), *more, cwd=tmp_path).strip()
        here.wait(job, "COMPLETED", "FAILED", seconds=240)
        said = next(tmp_path.glob(f"pythia-{job}.txt")).read_text()
        assert here.state(job) == "COMPLETED", said
    assert "continuing after iteration 10" in said and "iteration 20/20" in said


def _grown(path: Path, text: str, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while text not in (found := path.read_text()):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found
