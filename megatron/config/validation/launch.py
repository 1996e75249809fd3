"""Rules for ports, hosts, the launcher, and what workers are given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from megatron.config.config import Config
from megatron.errors import ConfigIssue


def ports_are_ports(config: Config) -> Iterator[ConfigIssue]:
    """A port is between 1 and 65535."""
    for section, name in ((config.launch, "master_port"), (config.generation, "serve_port")):
        port = getattr(section, name)
        if not 0 < port < 1 << 16:
            yield ConfigIssue("a port is between 1 and 65535", key=name, value=port)


def texts_are_unicode(config: Config) -> Iterator[ConfigIssue]:
    """Workers get the configuration as UTF-8, which a file name of other bytes has no place in."""
    for key, value in config.flat().items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            shown = list(value) if isinstance(value, Mapping) else value  # of files their names, not their text
            hint = "rename the file or folder, or give a link to it"
            yield ConfigIssue("it holds bytes that are not UTF-8", key=key, value=shown, hint=hint)


def hosts_are_counted(config: Config) -> Iterator[ConfigIssue]:
    """num_nodes and num_gpus are positive, or -1 for all."""
    for name in ("num_nodes", "num_gpus"):
        count = getattr(config.launch, name)
        if count is not None and (count == 0 or count < -1):
            yield ConfigIssue("it must be more than 0, or -1 for all", key=name, value=count)


def one_launcher_is_named(config: Config) -> Iterator[ConfigIssue]:
    """deepspeed_slurm and deepspeed_mpi do not contradict launcher."""
    launch = config.launch
    if launch.deepspeed_slurm and launch.launcher not in {"pdsh", "slurm"}:
        what = f"launcher = {launch.launcher} asks for another one"
        yield ConfigIssue(what, key="deepspeed_slurm", value=True, hint="leave one of the two out")
    if launch.deepspeed_mpi and launch.launcher not in {"pdsh", "openmpi", "mpich", "impi", "mvapich"}:
        what = f"launcher = {launch.launcher} asks for another one"
        yield ConfigIssue(what, key="deepspeed_mpi", value=True, hint="leave one of the two out")
    if launch.deepspeed_mpi and launch.deepspeed_slurm:
        yield ConfigIssue("deepspeed_slurm asks for srun", key="deepspeed_mpi", value=True, hint="keep one of the two")
    if launch.launcher == "local" and launch.force_multi:
        what = "launcher = local starts workers on this host only"
        yield ConfigIssue(what, key="force_multi", value=True, hint="leave one of the two out")
