"""Starting a failed run again: from its newest checkpoint, on the hosts that still answer.

The global batch stays what it was: fewer ranks accumulate more micro-batches. An error of the user's and a stop that
was asked for are not failures.
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
from megatron.launcher.arguments import Request
from megatron.launcher.resolve import Resolved, resolve_request
from megatron.launcher.ssh_check import ask
from megatron.launcher.supervisor import MISTAKE, Outcome

COUNTERS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""How torchrun and Slurm say that they started a job again."""


def failed(outcome: Outcome) -> bool:
    """Whether another attempt may help."""
    return outcome.code not in (0, MISTAKE) and outcome.stopped_by is None


def resume_overrides(config: Config, since: float | None = None) -> dict[str, Any]:
    """The keys that let a run go on from its newest checkpoint; none while it has not saved one.

    since: when the run was launched [s since the epoch]; with `save_overwrite`, what was saved before is another run's.
    Where hosts share no files this one may lack what others have saved, so a run that starts from nothing else looks.
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
        # What the first start left out of another checkpoint is in the run's own.
        "no_load_optim": config.checkpoint.no_load_optim and config.checkpoint.no_save_optim,
        "no_load_rng": config.checkpoint.no_load_rng and config.checkpoint.no_save_rng,
    }


def _has_saved(save: Path, since: float | None) -> bool:
    """Whether the folder holds a checkpoint, made after that moment [s since the epoch] where one is given."""
    found = [layout.step_directory(save, number) for number in layout.iterations(save)]
    return any(since is None or directory.stat().st_mtime >= since for directory in found)


def restarted_by_scheduler(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or Slurm have started this job before."""
    return any(int(environment.get(name) or 0) > 0 for name in COUNTERS)


def resolve_again(
    request: Request,
    before: Resolved,
    environment: Mapping[str, str],
    answers: Callable[[str], bool] | None = None,
    since: float | None = None,
) -> Resolved:
    """The next attempt: the request with what lets it go on, resolved for the hosts that answer.

    since: as `resume_overrides` takes it. answers: whether a host can be reached, None to ask none. Raises RunError
    where no host is left, ConfigError where the layout or the batch does not fit those that are.
    """
    config, hosts = before.resolution.config, list(before.machines.hosts)
    flags = {**request.flags, **resume_overrides(config, since)}
    if answers is not None and not before.machines.is_local:
        left = [host for host in hosts if answers(host)]
        if not left:
            raise RunError.of(f"none of the hosts answers: {', '.join(hosts)}", location="restart")
        if left != hosts:
            flags |= _fewer(left, config)
    return resolve_request(replace(request, flags=flags), environment)


def _fewer(hosts: Sequence[str], config: Config) -> dict[str, Any]:
    """Keys for a run on these hosts with the same global batch."""
    return {
        "include": "@".join(hosts),
        "exclude": None,
        "num_nodes": -1,
        "global_num_gpus": None,
        "train_batch_size": config.training.train_batch_size,
        "train_micro_batch_size_per_gpu": config.training.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": None,
    }


def answers_ssh(host: str) -> bool:
    """Whether a host lets this user in by ssh, without a password, in time."""
    return ask(host, os.environ).error is None
