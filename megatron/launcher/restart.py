"""Restarts a failed run from its newest checkpoint, on the hosts that are still reachable.

The global batch does not change: fewer ranks accumulate more micro batches. Config errors and requested stops are not
restarted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.format import layout
from megatron.config import Config
from megatron.errors import RunError
from megatron.launcher.arguments import LaunchRequest
from megatron.launcher.resolve import Resolved, resolve_request
from megatron.launcher.ssh_check import check_ssh
from megatron.launcher.supervisor import CONFIG_ERROR_CODE, Outcome

COUNTERS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Variables in which torchrun and Slurm count restarts."""


def should_restart(outcome: Outcome) -> bool:
    """Returns whether another attempt may help."""
    return outcome.code not in (0, CONFIG_ERROR_CODE) and outcome.stopped_by is None


def resume_overrides(config: Config, since: float | None = None) -> dict[str, Any]:
    """Returns the keys that resume a run from its newest checkpoint; none before the first one.

    Without a shared file system this host may lack checkpoints of others, so the keys are returned in any case.

    since: time of the launch [s since the epoch]; with `save_overwrite` earlier checkpoints belong to another run.
    """
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None:
        return {}
    own = load is None or layout.same_folder(Path(load), Path(save))
    looks = not config.data.use_shared_fs and own
    if not (looks or _has_saved(Path(save), since if config.checkpoint.save_overwrite else None)):
        return {}
    return {
        "load": save,
        "iteration": None,
        "finetune": False,
        "load_fallback": "previous",
        "save_overwrite": False,
        # Checkpoints of the run itself have what the first start did not load from another one.
        "no_load_optim": config.checkpoint.no_load_optim and config.checkpoint.no_save_optim,
        "no_load_rng": config.checkpoint.no_load_rng and config.checkpoint.no_save_rng,
    }


def _has_saved(save: Path, since: float | None) -> bool:
    """Returns whether the folder has a checkpoint, made after `since` [s since the epoch] if given."""
    found = [layout.step_directory(save, number) for number in layout.iterations(save)]
    return any(since is None or directory.stat().st_mtime >= since for directory in found)


def restarted_by_scheduler(environment: Mapping[str, str]) -> bool:
    """Returns whether torchrun or Slurm have restarted this job."""
    return any(int(environment.get(name) or 0) > 0 for name in COUNTERS)


def resolve_again(
    request: LaunchRequest,
    previous: Resolved,
    environment: Mapping[str, str],
    reachable: Callable[[str], bool] | None = None,
    since: float | None = None,
) -> Resolved:
    """Resolves the next attempt, which resumes on the reachable hosts.

    Raises RunError when no host is left, ConfigError when layout or batch do not fit the remaining ones.

    Args:
        request: the original command line.
        previous: the last attempt.
        environment: of deepy.py.
        reachable: returns whether a host is reachable; None to skip the check.
        since: see `resume_overrides`.
    """
    config, hosts = previous.resolution.config, list(previous.machines.hosts)
    flags = {**request.flags, **resume_overrides(config, since)}
    if reachable is not None and not previous.machines.is_local:
        left = [host for host in hosts if reachable(host)]
        if not left:
            raise RunError.of(f"none of the hosts answers: {', '.join(hosts)}", location="restart")
        if left != hosts:
            flags |= _shrink(left, config)
    return resolve_request(replace(request, flags=flags), environment)


def _shrink(hosts: Sequence[str], config: Config) -> dict[str, Any]:
    """Returns the keys for a run on these hosts with the same global batch."""
    return {
        "include": "@".join(hosts),
        "exclude": None,
        "num_nodes": -1,
        "global_num_gpus": None,
        "train_batch_size": config.training.train_batch_size,
        "train_micro_batch_size_per_gpu": config.training.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": None,
    }


def is_reachable(host: str) -> bool:
    """Returns whether a host accepts ssh without a password."""
    return check_ssh(host, os.environ).error is None
