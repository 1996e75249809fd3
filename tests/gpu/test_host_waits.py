"""Steps between reports on a GPU under torch's check for calls that make the host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.distributed.process_group import device
from megatron.engine.batch_copies import DeviceCopies
from megatron.engine.builder import build_training_engine, init_topology
from megatron.training.hooks.base import Hook
from megatron.training.loss_guard import LossGuard
from megatron.training.step_schedule import StepSize
from tests.end_to_end import engines
from tests.engine import test_host_reads as counted
from tests.multi_rank import run_distributed

pytestmark = pytest.mark.gpu
FREE = [
    {**counted.MOE, "precision": "bfloat16"},
    *(keys for keys, allowed in counted.CASES.values() if not allowed),
    *({**counted.ONE_STAGE, **keys} for keys, allowed in counted.PIPELINE.values() if not allowed),
]


class Watching(Hook):
    """Turns the check on from the first step without a report to the next step with one."""

    def before_step(self, iteration: int, size: StepSize) -> None:
        quiet = iteration in counted.QUIET
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")


def watched(rank: int, world_size: int, case: dict[str, Any], plants: bool) -> int:
    """Trains; returns the number of reports. plants: read the loss after each step."""
    keys = {**engines.BASE, "distributed_backend": "nccl", **case}
    config = resolve([], keys, Resources(world_size)).config
    topology = init_topology(config)
    engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
    locator: Any = None
    hooks: list[Hook] = [Watching(), LossGuard(locator, "stop", 2.0, scaled=False, log=print)]
    if plants:
        reading = Hook()
        reading.after_step = lambda state, size, result: result.loss.item()  # type: ignore[method-assign]
        hooks.append(reading)
    batches = [batch.pin_memory() for batch in engines.batches(config, topology)]
    reporter = counted.train(config, engine, batches, hooks, lag=1, to_device=DeviceCopies(device()))
    return len(reporter.reports)


@pytest.mark.parametrize("case", FREE)
def test_the_host_does_not_wait_between_reports(case: dict[str, Any]) -> None:
    assert run_distributed(watched, 1, case, False, timeout=300) == [3]


def test_a_planted_read_is_an_error() -> None:
    with pytest.raises(Exception, match="synchronizing"):
        run_distributed(watched, 1, {}, True, timeout=300)
