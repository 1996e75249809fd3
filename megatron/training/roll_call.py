"""Before anything is built: are all hosts of this run what they should be?"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch.distributed as dist

from megatron.errors import RunError
from megatron.log import get_logger
from megatron.parallel.bootstrap import host_name
from megatron.parallel.census import hosts, judge, table, take_census, warnings

_log = get_logger(__name__)


def roll_call(config_text: str, folder: Path | None, *, shared: bool) -> list[str]:
    """Compares the hosts of the run and says so in one table; returns the host of every rank. Collective.

    config_text: the configuration as this rank has it, without what differs by rank. folder: the run directory.
    shared: all hosts must see it. Raises RunError, the same on every rank, that names each wrong host.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [host_name()]
    facts = take_census(hashlib.sha256(config_text.encode()).hexdigest(), folder)
    if len(hosts(facts)) > 1:
        _log.info("the hosts of this run:\n%s", table(facts))
        for line in warnings(facts, shared=shared):
            _log.info("%s", line)
        RunError.raise_any(judge(facts, shared=shared))
    return [each.host for each in facts]
