"""The door deepy.py, as a process of its own: plan, refusals, and the real DeepSpeed launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.launcher.cli import main
from megatron.launcher.dry_run import redact_environment
from tests.launcher.conftest import CONFIG, ROOT

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "conf.yml").write_text(CONFIG)

    def call(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        return subprocess.run(
            [sys.executable, *options, str(ROOT / "deepy.py"), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return call


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The same without a process of its own: exit code, stdout and stderr of deepy.py's main program."""
    (tmp_path / "conf.yml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return lambda *arguments: (main(arguments), *capsys.readouterr())


def test_the_script_runs_as_a_program() -> None:
    assert os.access(ROOT / "deepy.py", os.X_OK)
    assert (ROOT / "deepy.py").read_text().startswith("#!/usr/bin/env python3\n")


def test_help(run: Run, call: Call) -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ./deepy.py SCRIPT")
    assert call()[0] == 2


def test_a_dry_run_prints_the_plan_writes_nothing_and_imports_no_torch(run: Run, tmp_path: Path) -> None:
    done = run("train.py", "conf", "--dry-run", options=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    assert "2 ranks = no pipeline x data 2 x tensor 1" in done.stdout
    shown = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "hidden_size 64 (conf.yml:2)" in shown
    assert "gradient_accumulation_steps 1 (derived)" in shown
    assert not any(line.startswith("log_interval") for line in shown)
    imported = {line.split("|")[-1].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "megatron" in imported
    assert not imported & {"torch", "deepspeed", "numpy", "transformers"}
    assert [path.name for path in tmp_path.iterdir()] == ["conf.yml"]


def test_a_dry_run_as_json_is_one_object_and_nothing_else(call: Call) -> None:
    code, out, err = call("train.py", "conf", "--dry-run", "--json", "--seed", "7")
    assert code == 0
    assert err == ""
    reported = json.loads(out)
    assert set(reported) == {"config", "origin", "deepspeed", "launch", "plan", "warnings", "not_supported_yet"}
    assert reported["origin"]["hidden_size"] == "conf.yml:2"
    assert reported["origin"]["seed"] == "command line"
    assert reported["origin"]["train_batch_size"] == "derived"
    assert reported["plan"]["world_size"] == reported["plan"]["data_parallel_size"] == 2
    assert reported["plan"]["train_batch_size"] == 4
    assert set(reported["plan"]["memory_per_rank_bytes"]) == {
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "total",
    }
    assert reported["deepspeed"]["train_batch_size"] == 4
    assert "megatron.launcher.rank_agent" in reported["launch"]["argv"]
    assert reported["launch"]["env"]["MALLOC_TRIM_THRESHOLD_"]


def test_issues_of_flags_files_arithmetic_and_rules_are_reported_in_one_round(call: Call, tmp_path: Path) -> None:
    (tmp_path / "more.yml").write_text("train_batch_size: 7\nhidden-size: 32\nnorm: rmsnrm\nsave: x\nseed: 0\n")
    code, _, err = call("train.py", "conf", "more", "--eval-itres", "3", "--split", "a", "--hostfile", "none")
    assert code == 2
    assert "Traceback" not in err
    starts = [line.split(": ", 2)[:2] for line in err.splitlines()]
    assert [(at, reported.partition(" ")[0]) for at, reported in starts] == [
        ("more.yml:2", "hidden_size"),
        ("more.yml:3", "norm"),
        ("more.yml:4", "save"),
        ("more.yml:5", "seed"),
        ("command line", "--eval-itres"),
        ("command line", "hostfile"),
        ("command line", "split"),
    ]
    (tmp_path / "more.yml").write_text("train_batch_size: 7\nlog-interval: often\n")
    lines = call("train.py", "conf", "more")[2].splitlines()
    assert len(lines) == 2
    assert "7 = " in lines[0]
    assert lines[1].startswith("more.yml:2: log_interval = 'often'")


@pytest.mark.usefixtures("run")
def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    script = (
        f"'{sys.executable}' '{ROOT}/deepy.py' train.py conf --dry-run --json | head -c 10; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) == 10


def test_secrets_are_not_shown(call: Call) -> None:
    for flags in (["--json"], []):
        assert "opensesame" not in call("train.py", "conf", "--dry-run", "--serve-key", "opensesame", *flags)[1]
    shown = redact_environment({"WANDB_API_KEY": "abc", "OMP_NUM_THREADS": "2"})
    assert shown == {"WANDB_API_KEY": "(redacted)", "OMP_NUM_THREADS": "2"}


def test_every_issue_is_one_line_and_the_code_is_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("hiden_size: 4\ntrain_iters: abc\nnorm: layernrom\n")
    done = run("train.py", "bad")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 7  # and what else is not given
    assert lines[0].startswith("bad.yml:1: hiden_size")
    assert "hidden_size" in lines[0]
    assert any(line.startswith("bad.yml:2: train_iters = 'abc'") for line in lines)
    assert any("did you mean layernorm?" in line for line in lines)


def test_a_issue_in_the_machines_has_its_position(call: Call) -> None:
    code, _, err = call("train.py", "conf", "--hostfile", "nowhere")
    assert code == 2
    assert "hostfile = 'nowhere': there is no such file" in err
    assert len(err.splitlines()) == 1


def test_what_is_not_built_is_planned_but_not_launched(call: Call, tmp_path: Path) -> None:
    asked = ("train.py", "conf", "--lazy_mpu_init", "true")
    code, out, err = call(*asked, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["not_supported_yet"]
    code, _, err = call(*asked)
    assert code == 2
    assert "lazy_mpu_init" in err
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_the_machine_carries_are_planned_but_not_launched(call: Call, tmp_path: Path) -> None:
    (tmp_path / "conf.yml").write_text(CONFIG.replace("num_gpus: 2", "global_num_gpus: 1024"))
    code, out, _ = call("train.py", "conf", "--dry-run")
    assert code == 0
    assert "1024 ranks" in out
    assert "Cannot start here" in out
    code, _, err = call("train.py", "conf")
    assert code == 2
    assert "name the hosts in a hostfile" in err


def test_the_real_launcher_starts_every_rank(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever job's variables are in the environment."""
    for name, text in {"MASTER_ADDR": "nohost", "RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, text)
    (tmp_path / "work.py").write_text(
        "# takes the place of a worker that uses megatron.launcher.worker\n"
        "import json, os, sys, time\n"
        "from megatron.launcher.worker_config import worker_config\n"
        "assert 'OMPI_COMM_WORLD_LOCAL_RANK' not in os.environ\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'DS_ACCELERATOR')\n"
        "reported = {name: os.environ[name] for name in names}\n"
        "reported['log_dir'] = worker_config(sys.argv[1:]).observe.log_dir\n"
        "with open('new.' + reported['RANK'], 'w') as file:\n"
        "    json.dump(reported, file)\n"
        "os.rename('new.' + reported['RANK'], 'reported.' + reported['RANK'])\n"
        "while not os.path.exists('reported.0'):\n"
        "    time.sleep(0.02)\n"
        "sys.exit(5 if reported['RANK'] == '1' else 0)\n"
    )
    done = run("work.py", "conf")
    assert done.returncode == 5
    assert "rank 1 failed first, with exit code 5" in done.stderr
    reported = [json.loads((tmp_path / f"reported.{rank}").read_text()) for rank in range(2)]
    assert [one["LOCAL_RANK"] for one in reported] == ["0", "1"]
    assert all(one["WORLD_SIZE"] == "2" and one["MASTER_ADDR"] == "127.0.0.1" for one in reported)
    assert reported[0]["MASTER_PORT"] == reported[1]["MASTER_PORT"]
    assert reported[0]["log_dir"] == str(tmp_path / "run/work")
