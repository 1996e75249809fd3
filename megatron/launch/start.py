"""What deepy.py does: argv -> Request -> machines and Config -> plan -> run directory -> workers -> exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.config import Config, wire
from megatron.errors import ConfigError, RunError
from megatron.launch import again
from megatron.launch.command import (
    DEFAULT_PORT,
    Command,
    Rendezvous,
    free_port,
    local_command,
    many_hosts_command,
)
from megatron.launch.preflight import check
from megatron.launch.request import USAGE, Request, read_request, wants_help
from megatron.launch.resolution import Resolved, refuse_unsupported, resolve_request, wanted_machines
from megatron.launch.resources import Machines, hostfile_in_use
from megatron.launch.run_directory import (
    CONFIG_FILE,
    choose_run_directory,
    git_revision,
    prepare_run_directory,
)
from megatron.launch.show import as_json, as_text, values_as_text
from megatron.launch.supervise import Outcome, Supervisor, run_elsewhere, tell, terminal_environment

INTERRUPTED = 130  # 128 + SIGINT


def main(arguments: Sequence[str]) -> int:
    """Runs one command line of deepy.py and returns its exit code."""
    try:
        return _run(arguments)
    except (ConfigError, RunError) as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        print(USAGE, end="")
        return 0 if arguments else ConfigError.exit_code
    request = read_request(arguments)
    resolved = resolve_request(request, os.environ)
    config = resolved.resolution.config
    folder = choose_run_directory(config.observe.log_dir, config.checkpoint.save, request.files, request.script)
    if request.dry_run:
        command = build_command(request, resolved, folder, config.launch.master_port, os.environ)
        page = as_text(resolved) + values_as_text(resolved.resolution)
        print(as_json(resolved, command) + "\n" if request.as_json else page, end="")
        return 0
    return _launch(request, resolved, folder)


def _launch(request: Request, resolved: Resolved, folder: Path) -> int:
    """Runs the workers, again and again while they fail and `max_restarts` allows; returns the exit code."""
    launch = resolved.resolution.config.launch
    outcome = _attempt(request, resolved, folder)
    for number in range(1, launch.max_restarts + 1):
        if not again.failed(outcome):
            break
        resolved = again.resolve_again(
            request, resolved, os.environ, answers=None if launch.no_ssh_check else again.answers_ssh
        )
        whence = "from its newest checkpoint" if again.going_on(resolved.resolution.config) else "from its beginning"
        ranks = resolved.machines.world_size
        print(
            f"restart {number} of {launch.max_restarts}: the run goes on {whence}, on {ranks} ranks",
            file=sys.stderr,
            flush=True,
        )
        outcome = _attempt(request, resolved, folder)
    return outcome.code


def _attempt(request: Request, resolved: Resolved, folder: Path) -> Outcome:
    """Starts the workers, waits for them and tells how they ended."""
    machines, config = resolved.machines, resolved.resolution.config
    refuse_unsupported(resolved.resolution)
    if machines.shortage is not None:
        raise ConfigError.of(machines.shortage)
    caller = dict(os.environ)
    check(machines.accelerator, caller, precision=config.precision.precision)
    print(as_text(resolved), end="", file=sys.stderr, flush=True)
    port = config.launch.master_port
    if machines.is_local:
        port = free_port(port, given=resolved.resolution.origin["master_port"] != "default")
    config = config.replace(log_dir=str(folder), git_hash=git_revision(Path(__file__).parent))
    sources = config.checkpoint.config_files or {}
    prepare_run_directory(folder, wire.to_json(config), sources, ["deepy.py", *request.arguments])
    command = build_command(request, resolved, folder, port, caller)
    environment = {**caller, **command.environment, **terminal_environment()}
    if not starts_here(machines, config):
        return Outcome(run_elsewhere(command.argv, environment))
    talks = Path(request.script).name == "generate.py" and config.generation.text_gen_type == "interactive"
    supervisor = Supervisor(machines.world_size, interrupts_answers=talks)
    outcome = supervisor.run(command.argv, environment, folder / "launcher.log")
    tell(outcome)
    return outcome


def starts_here(machines: Machines, config: Config) -> bool:
    """Whether the workers are processes of this host, started without a tool for many hosts."""
    return machines.is_local and len(machines.hosts) == 1 and not config.launch.force_multi


def build_command(request: Request, resolved: Resolved, folder: Path, port: int, caller: Mapping[str, str]) -> Command:
    """The command that starts the workers of this request."""
    config, machines = resolved.resolution.config, resolved.machines
    launch = config.launch
    where = Rendezvous(
        master_addr=launch.master_addr or caller.get("MASTER_ADDR"),
        master_port=port or DEFAULT_PORT,
        launcher="slurm" if launch.deepspeed_slurm else launch.launcher,
        force_multi=launch.force_multi or launch.deepspeed_slurm or launch.deepspeed_mpi,
        no_ssh_check=launch.no_ssh_check,
        hostfile=hostfile_in_use(wanted_machines(launch), caller),
    )
    worker = (str(request.script), *_handed_over(config, folder, shared=starts_here(machines, config)))
    build = local_command if starts_here(machines, config) else many_hosts_command
    return build(machines, where, worker, folder, caller)


def _handed_over(config: Config, folder: Path, *, shared: bool) -> tuple[str, str]:
    """How the workers get the configuration: a file, or base64 text where their hosts share no file system."""
    if shared or config.data.use_shared_fs:
        return "--run-config", str(folder / CONFIG_FILE)
    return "--megatron-config", wire.encode(config.replace(log_dir=str(folder)))
