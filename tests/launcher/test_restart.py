"""What is worth another attempt, and what the next one is made of."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError, RunError
from megatron.launcher.arguments import LaunchRequest, read_request
from megatron.launcher.resolve import resolve_request
from megatron.launcher.restart import resolve_again, restarted_by_scheduler, resume_overrides, should_restart
from megatron.launcher.supervisor import Outcome
from tests.end_to_end.runs import BASE

ENVIRONMENT = {"DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        (Outcome(0), False),
        (Outcome(2), False),  # the same error would be reported again
        (Outcome(1), True),
        (Outcome(137, failed=1), True),
        (Outcome(143, stopped_by=signal.SIGTERM), False),
    ],
)
def test_what_is_worth_another_attempt(outcome: Outcome, again: bool) -> None:
    assert should_restart(outcome) == again


def test_restarts_of_torchrun_and_slurm_are_noticed() -> None:
    assert restarted_by_scheduler({"TORCHELASTIC_RESTART_COUNT": "1"})
    assert restarted_by_scheduler({"SLURM_RESTART_COUNT": "2"})
    assert not restarted_by_scheduler({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert not restarted_by_scheduler({})


@pytest.fixture
def request_on_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchRequest:
    """Eight samples a step on three hosts of two ranks: micro batch 2, no accumulation wanted."""
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {
        **BASE,
        "save": "save",
        "hostfile": "hosts",
        "train_batch_size": 12,
        "checkpoint_factor": 5,
    }
    settings |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "data_path": "text"}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\nc slots=2\n")
    return read_request(["train.py", "run.json"])


def test_a_run_without_a_checkpoint_starts_from_its_beginning(request_on_hosts: LaunchRequest) -> None:
    before = resolve_request(request_on_hosts, ENVIRONMENT)
    assert resume_overrides(before.resolution.config) == {}
    after = resolve_again(request_on_hosts, before, ENVIRONMENT)
    assert after.resolution.config == before.resolution.config


def test_a_run_with_a_checkpoint_goes_on_from_it(request_on_hosts: LaunchRequest, tmp_path: Path) -> None:
    before = resolve_request(request_on_hosts, ENVIRONMENT)
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "global_step10").mkdir()
    after = resolve_again(request_on_hosts, before, ENVIRONMENT).resolution.config.checkpoint
    assert (after.load, after.iteration, after.finetune, after.load_fallback) == ("save", None, False, "previous")


def test_a_new_start_does_not_go_on_from_what_it_was_to_move_aside(
    request_on_hosts: LaunchRequest, tmp_path: Path
) -> None:
    request_on_hosts = replace(request_on_hosts, flags={**request_on_hosts.flags, "save_overwrite": True})
    before = resolve_request(request_on_hosts, ENVIRONMENT)
    (tmp_path / "save" / "global_step10").mkdir(parents=True)
    launched = (tmp_path / "save" / "global_step10").stat().st_mtime + 1
    again = resolve_again(request_on_hosts, before, ENVIRONMENT, since=launched).resolution.config.checkpoint
    assert (again.load, again.save_overwrite) == (None, True)
    (tmp_path / "save" / "global_step5").mkdir()
    os.utime(tmp_path / "save" / "global_step5", (launched + 5, launched + 5))
    again = resolve_again(request_on_hosts, before, ENVIRONMENT, since=launched).resolution.config.checkpoint
    assert (again.load, again.save_overwrite) == ("save", False)


@pytest.mark.parametrize("saved", [True, False])
def test_what_the_first_start_left_out_is_read_from_its_own_checkpoint(
    saved: bool, request_on_hosts: LaunchRequest, tmp_path: Path
) -> None:
    """Optimizer and generators, unless the run does not save them either."""
    keys = {"load": "base", "no_load_optim": True, "no_load_rng": True}
    keys |= {} if saved else {"no_save_optim": True, "no_save_rng": True}
    request = replace(request_on_hosts, flags={**request_on_hosts.flags, **keys})
    before = resolve_request(request, ENVIRONMENT)
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "global_step10").mkdir()
    after = resolve_again(request, before, ENVIRONMENT).resolution.config.checkpoint
    assert (after.load, after.no_load_optim, after.no_load_rng) == ("save", not saved, not saved)


def test_fewer_hosts_keep_the_batch_by_accumulation(request_on_hosts: LaunchRequest) -> None:
    before = resolve_request(request_on_hosts, ENVIRONMENT)
    after = resolve_again(request_on_hosts, before, ENVIRONMENT, reachable=lambda host: host == "b")
    training = after.resolution.config.training
    assert list(after.machines.hosts) == ["b"] and after.machines.world_size == 2
    assert training.train_batch_size == 12
    assert (training.train_micro_batch_size_per_gpu, training.gradient_accumulation_steps) == (2, 3)


def test_a_batch_that_the_hosts_left_cannot_share_is_reported(request_on_hosts: LaunchRequest) -> None:
    before = resolve_request(request_on_hosts, ENVIRONMENT)
    with pytest.raises(ConfigError, match="train_batch_size"):
        resolve_again(request_on_hosts, before, ENVIRONMENT, reachable=lambda host: host != "b")


def test_no_host_that_answers_is_the_end(request_on_hosts: LaunchRequest) -> None:
    before = resolve_request(request_on_hosts, ENVIRONMENT)
    with pytest.raises(RunError, match="none of the hosts answers: a, b, c"):
        resolve_again(request_on_hosts, before, ENVIRONMENT, reachable=lambda host: False)
