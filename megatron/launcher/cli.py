"""Main program of deepy.py: parses arguments, resolves the Config, prints the plan, starts workers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron.config import Config
from megatron.errors import INTERRUPTED, ConfigError, RunError
from megatron.launcher import restart
from megatron.launcher.arguments import USAGE, LaunchRequest, read_request, wants_help
from megatron.launcher.commands.local import (
    DEFAULT_PORT,
    Command,
    Rendezvous,
    local_command,
    rendezvous_port,
    torchrun_command,
)
from megatron.launcher.commands.multi_host import HOSTFILE, OVER_SSH, multi_host_command
from megatron.launcher.dry_run import as_json, as_text, values_as_text
from megatron.launcher.hosts import SCHEDULERS, Hosts, local_names, without_user
from megatron.launcher.preflight import check, gpu_layers, uses_host_adam
from megatron.launcher.rank_env import without_rank_env
from megatron.launcher.resolve import Resolved, launcher_of, refuse_unsupported, resolve_request
from megatron.launcher.run_directory import (
    choose_run_directory,
    git_revision,
    prepare_run_directory,
)
from megatron.launcher.ssh_check import check_hosts, check_launcher, node_number, own_address
from megatron.launcher.supervisor import Network, Outcome, Supervisor, print_outcome, terminal_environment
from megatron.launcher.worker_config import config_argument
from megatron.output_streams import discard_output, escape_characters, ignore_lost_output
from megatron.plan.base_shapes import check_base_shapes, write_base_shapes
from megatron.plan.kernel_choices import kernel_issues


def main(arguments: Sequence[str]) -> int:
    """Runs one command line of deepy.py and returns its exit code."""
    escape_characters()
    try:
        return _run(arguments)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the plan has closed the pipe
        discard_output()
        return 0


def _run(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        print(USAGE, end="")
        return 0 if arguments else ConfigError.exit_code
    request = read_request(arguments)
    resolved = resolve_request(request, os.environ)
    config = resolved.resolution.config
    check_base_shapes(config)
    folder = choose_run_directory(config.observe.log_dir, config.checkpoint.save, request.files, request.script)
    if request.dry_run:
        command = build_command(request, resolved, folder, find_rendezvous(resolved, os.environ), os.environ)
        page = as_text(resolved) + values_as_text(resolved.resolution)
        print(as_json(resolved, command) + "\n" if request.as_json else page, end="", flush=True)
        return 0
    if config.mup.save_base_shapes:
        print(write_base_shapes(config))
        return 0
    return _launch(request, resolved, folder)


def _launch(request: LaunchRequest, resolved: Resolved, folder: Path) -> int:
    """Runs the workers, and restarts them after failures up to `max_restarts` times; returns the exit code."""
    ignore_lost_output()
    launch = resolved.resolution.config.launch
    by_ssh = launcher_of(launch) in OVER_SSH
    launched = time.time()
    outcome = _attempt(request, resolved, folder)
    for number in range(1, launch.max_restarts + 1):
        if not restart.should_restart(outcome):
            break
        reachable = restart.is_reachable if by_ssh and not launch.no_ssh_check else None
        resumes = restart.resume_overrides(resolved.resolution.config, launched)
        resolved = restart.resolve_again(request, resolved, os.environ, reachable=reachable, since=launched)
        start = "from its newest checkpoint" if resumes else "from its beginning"
        ranks = resolved.machines.world_size
        print(
            f"restart {number} of {launch.max_restarts}: the run continues {start}, on {ranks} ranks",
            file=sys.stderr,
            flush=True,
        )
        outcome = _attempt(request, resolved, folder)
    return outcome.code


def _attempt(request: LaunchRequest, resolved: Resolved, folder: Path) -> Outcome:
    """Starts the workers, waits for them and prints the outcome."""
    machines, config = resolved.machines, resolved.resolution.config
    refuse_unsupported(resolved.resolution)
    if machines.shortage is not None:
        raise ConfigError.of(machines.shortage)
    caller = dict(os.environ)
    check(
        machines.accelerator,
        caller,
        precision=config.precision.precision,
        zero=config.deepspeed.zero_optimization,
        gpu_layers=gpu_layers(config, request.script),
        kernels=kernel_issues(config, machines.accelerator),
        host_adam=uses_host_adam(config, request.script),
    )
    print(as_text(resolved), end="", file=sys.stderr, flush=True)
    launcher = launcher_of(config.launch)
    local = is_local_launch(machines, launcher, force=force_multi_host(config))
    rendezvous = _rendezvous_for(resolved, caller, local=local)
    config = config.replace(log_dir=str(folder), git_hash=git_revision(Path(__file__).parent))
    network = None if local else Network.open()
    if network is not None:
        remote = rendezvous.master_addr or (without_user(next(iter(machines.hosts))) if machines.named else None)
        rendezvous = replace(rendezvous, supervisor=network.address(own_address(remote)))
    file = prepare_run_directory(folder, config, ["deepy.py", *request.arguments])
    command = build_command(request, resolved, folder, rendezvous, caller, file)
    if command.hostfile is not None:
        (folder / HOSTFILE).write_text(command.hostfile, encoding="utf-8")
    environment = {**(without_rank_env(caller) if local else caller), **command.environment, **terminal_environment()}
    interactive = Path(request.script).name == "generate.py" and config.generation.text_gen_type == "interactive"
    ranks = (
        len(machines.hosts[list(machines.hosts)[rendezvous.node]]) if launcher == "torchrun" else machines.world_size
    )
    supervisor = Supervisor(ranks, interrupts_answers=interactive, network=network)
    outcome = supervisor.run(command.argv, environment, folder / "launcher.log")
    print_outcome(outcome)
    return outcome


def force_multi_host(config: Config) -> bool:
    """Returns whether a launcher for several hosts is used even for one."""
    return config.launch.force_multi or config.launch.deepspeed_mpi


def is_local_launch(machines: Hosts, launcher: str, *, force: bool = False) -> bool:
    """Returns whether the workers are started on this host, without a launcher for several hosts."""
    if launcher == "torchrun":
        return True
    return machines.is_local and len(machines.hosts) == 1 and not force and launcher not in SCHEDULERS


def _rendezvous_for(resolved: Resolved, caller: Mapping[str, str], *, local: bool) -> Rendezvous:
    """Checks the launcher and its hosts; returns the rendezvous. Raises ConfigError."""
    launch, machines = resolved.resolution.config.launch, resolved.machines
    rendezvous = find_rendezvous(resolved, caller)
    given = resolved.resolution.origin["master_port"] != "default"
    if next(iter(machines.hosts)) in local_names():
        rendezvous = replace(rendezvous, master_port=rendezvous_port(launch.master_port, given=given))
    if rendezvous.launcher == "torchrun":
        node = node_number(list(machines.hosts), caller, local_names())
        if len(machines.hosts) > 1 and rendezvous.master_addr is None:
            what = "the hosts do not know where they meet"
            raise ConfigError.of(what, key="master_addr", hint="give the address of the first host")
        return replace(rendezvous, node=node)
    if local:
        return rendezvous
    if rendezvous.launcher == "local":
        hosts = ", ".join(machines.hosts)
        what = f"the hostfile names other hosts: {hosts}"
        raise ConfigError.of(what, key="launcher", value="local", hint="name a launcher for several hosts")
    check_launcher(rendezvous.launcher, caller)
    if launch.no_ssh_check:
        return rendezvous
    address = check_hosts(rendezvous.launcher, list(machines.hosts), caller)
    return replace(rendezvous, master_addr=rendezvous.master_addr or address)


def find_rendezvous(resolved: Resolved, caller: Mapping[str, str]) -> Rendezvous:
    """Returns the rendezvous of keys and environment, without checks."""
    config, machines = resolved.resolution.config, resolved.machines
    launch, launcher = config.launch, launcher_of(config.launch)
    # On a single host the environment's MASTER_ADDR belongs to another job.
    alone = len(machines.hosts) == 1 and is_local_launch(machines, launcher, force=force_multi_host(config))
    return Rendezvous(
        master_addr=launch.master_addr or (None if alone else caller.get("MASTER_ADDR")),
        master_port=launch.master_port or DEFAULT_PORT,
        launcher=launcher,
        launcher_args=launch.launcher_args,
        comment=launch.comment,
        account=launch.account,
    )


def build_command(
    request: LaunchRequest,
    resolved: Resolved,
    folder: Path,
    rendezvous: Rendezvous,
    caller: Mapping[str, str],
    file: Path | None = None,
) -> Command:
    """Returns the command that starts the workers.

    Args:
        request: the parsed command line.
        resolved: configuration and hosts.
        folder: the run directory.
        rendezvous: address, port and launcher.
        caller: the environment of deepy.py.
        file: the configuration that was written for the workers, if it was.
    """
    config, machines = resolved.resolution.config, resolved.machines
    local = is_local_launch(machines, rendezvous.launcher, force=force_multi_host(config))
    worker = (str(request.script), *config_argument(config, folder, shared=local, file=file))
    build = torchrun_command if rendezvous.launcher == "torchrun" else local_command if local else multi_host_command
    return build(machines, rendezvous, worker, folder, caller)
