"""What the host reads of tensors during training: on a GPU each read waits for all work that was issued before.

A small run of the real loop and engines on the CPU, with the lag that a GPU has. Steps without a report read nothing
but values of older steps that have been copied to the host, and what is listed here for DeepSpeed.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config import Config, Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.engine.base import BaseEngine
from megatron.engine.builder import build_training_engine, init_topology
from megatron.metrics.timers import no_wait
from megatron.training.hooks.base import Hook, Hooks
from megatron.training.loop import run_loop
from megatron.training.loop_context import LoopContext
from megatron.training.loss_guard import LossGuard
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSize
from tests.end_to_end import engines
from tests.multi_rank import run_distributed
from tests.training.schedules import plain_schedule

STEPS, LOG_INTERVAL = 6, 5  # reports after 1, 5 and 6
QUIET = (3, 4)  # in the second step ZeRO 3 checks the order of modules that it has recorded
aten = torch.ops.aten
READING = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten._unique2,
    aten.bincount,
}
COPIED_BEFORE = "megatron/distributed/host_copy.py"
"""Reads copies that are on the host already, of older steps."""
ON_CPU_ONLY = "megatron/distributed/tensor_parallel/linear_cross_entropy.py"
"""Asks whether a factor is 1 where tensors are on the CPU, where that costs nothing."""

PLAIN_GROUPED = "megatron/kernels/grouped_matmul.py"
"""Reads the rows of each expert: on a CPU, and outside of bfloat16."""

ZERO_1_2 = "deepspeed/runtime/zero/stage_1_and_2.py"
ZERO_3 = "deepspeed/runtime/zero/stage3.py"
UTILS = "deepspeed/runtime/utils.py"
FINITE_NORM = f"{UTILS} is_invalid_grad_norm"

MOE = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk", "moe_aux_loss_coeff": 0.1}
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "fp32": ({}, {}),
    "bfloat16": ({"precision": "bfloat16"}, {}),
    "bfloat16, two micro batches": ({"precision": "bfloat16", "gradient_accumulation_steps": 2}, {}),
    "experts": (MOE, {f"{PLAIN_GROUPED} plain_grouped": 4}),
    "fp32, ZeRO 1": ({"zero_optimization": {"stage": 1}}, {FINITE_NORM: 3}),
    "bfloat16, ZeRO 2": (
        {"precision": "bfloat16", "zero_optimization": {"stage": 2}},
        {FINITE_NORM: 3, f"{ZERO_1_2} has_overflow": 1},
    ),
    "ZeRO 3": ({"zero_optimization": {"stage": 3}}, {FINITE_NORM: 1}),
}
PIPELINE: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "pipeline": ({}, {}),
    "pipeline, bfloat16": ({"precision": "bfloat16"}, {}),
}
ONE_STAGE = {"pipe_parallel_size": 1, "gradient_accumulation_steps": 2}
"""For DeepSpeed's pipeline engine, in one process."""


class Reads(TorchDispatchMode):
    """Counts the reads of each iteration, by the line of this project's or DeepSpeed's code."""

    def __init__(self) -> None:
        super().__init__()
        self.iteration = 0
        self.found: dict[int, Counter[str]] = {}

    def note(self) -> None:
        """Counts a read."""
        self.found.setdefault(self.iteration, Counter())[_caller()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READING or _by_mask(func, args):
            self.note()
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts what is read past the dispatcher: lists and arrays."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            self._reads.note()
        return func(*args, **(kwargs or {}))


def _by_mask(func: Any, args: Any) -> bool:
    """Whether a tensor is indexed by a mask, whose length only the device knows."""
    if func.overloadpacket not in (aten.index, aten.index_put_, aten.index_put):
        return False
    return any(one is not None and one.dtype == torch.bool for one in args[1])


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        for root in ("/site-packages/deepspeed/", "/megatron/"):
            if root in frame.filename:
                return f"{root.strip('/').rpartition('/')[2]}/{frame.filename.rpartition(root)[2]} {frame.name}"
    return "elsewhere"


class Following(Hook):
    """Sets the iteration of the count."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def before_step(self, iteration: int, size: StepSize) -> None:
        self._reads.iteration = iteration


class Same:
    """The same micro batches again and again."""

    full_pass = None

    def __init__(self, batches: list[MicroBatch]) -> None:
        self._batches = batches

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]:
        while True:
            yield from self._batches


class Silent:
    """Takes the place of the reporter."""

    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []

    def train(self, iteration: int, metrics: dict[str, float], *, total_iterations: int) -> None:
        self.reports.append(metrics)

    def progress(self, iteration: int) -> None:
        pass


def train(
    config: Config,
    engine: BaseEngine,
    batches: list[MicroBatch],
    hooks: list[Hook],
    lag: int,
    to_device: Callable[[MicroBatch], MicroBatch] = lambda batch: batch,
) -> Silent:
    """Runs the loop over the batches."""
    micro, samples = config.training.gradient_accumulation_steps or 1, config.training.train_batch_size or 0
    schedule = plain_schedule(
        STEPS, samples=samples, length=engines.LENGTH, micro_batches=micro, log_interval=LOG_INTERVAL
    )
    lr_schedule: Any = type("Constant", (), {"lr": lambda self, step: 1e-3})()
    reporter: Any = Silent()
    context = LoopContext(
        engine=engine,
        lr_schedule=lr_schedule,
        train=Same(batches),
        valid=None,
        reporter=reporter,
        stop_requested=lambda: False,
        save=None,
        check_saves=no_wait,
        synchronize=no_wait,
        peak_memory=lambda: 0,
        hooks=Hooks(hooks),
        outcome_lag=lag,
        to_device=to_device,
    )
    run_loop(schedule, context, RunState())
    return reporter


def counted(rank: int, world_size: int, cases: dict[str, dict[str, Any]]) -> dict[str, dict[int, dict[str, int]]]:
    """The reads of each iteration of each case."""
    found = {}
    topology = None
    for name, case in cases.items():
        config = resolve([], {**engines.BASE, **case}, Resources(world_size)).config
        topology = topology or init_topology(config)
        engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
        reads = Reads()
        locator: Any = None
        hooks = [Following(reads), LossGuard(locator, "stop", 2.0, scaled=False, log=print)]
        with reads, Lists(reads):
            reporter = train(config, engine, engines.batches(config, topology), hooks, lag=1)
        assert len(reporter.reports) == 3
        found[name] = {number: dict(counts) for number, counts in reads.found.items()}
    return found


@pytest.fixture(scope="module")
def reads() -> dict[str, dict[int, dict[str, int]]]:
    plain = run_distributed(counted, 1, {name: keys for name, (keys, _) in CASES.items()}, timeout=300)[0]
    stages = {name: {**ONE_STAGE, **keys} for name, (keys, _) in PIPELINE.items()}
    return {**plain, **run_distributed(counted, 1, stages, timeout=300)[0]}


@pytest.mark.parametrize("case", [*CASES, *PIPELINE])
def test_a_step_without_a_report_reads_nothing(case: str, reads: dict[str, dict[int, dict[str, int]]]) -> None:
    allowed = {**CASES, **PIPELINE}[case][1]
    for iteration in QUIET:
        found = {
            name: count
            for name, count in reads[case][iteration].items()
            if not name.startswith((COPIED_BEFORE, ON_CPU_ONLY))
        }
        assert found == allowed, iteration


def test_the_count_sees_what_is_read() -> None:
    """Without this a count that misses every read would pass."""
    values = torch.arange(4.0)
    with Reads() as reads, Lists(reads):
        values.sum().item()
        float(values[0])
        if values.max() > 1:
            values[values > 1]
        values.nonzero()
        values.tolist()
    assert sum(reads.found[0].values()) == 6


def test_a_report_reads(reads: dict[str, dict[int, dict[str, int]]]) -> None:
    """The values of the step itself, in the loop."""
    assert any(name.startswith("megatron/training/loop.py") for name in reads["fp32"][LOG_INTERVAL])
    assert not any(name.startswith("megatron/training/loop.py") for name in reads["fp32"][QUIET[0]])


def test_nothing_of_ours_is_allowed_beside_three_files() -> None:
    allowed = {name for _, some in (*CASES.values(), *PIPELINE.values()) for name in some}
    assert {name for name in allowed if not name.startswith("deepspeed/")} == {f"{PLAIN_GROUPED} plain_grouped"}
    root = Path(__file__).parents[2]
    assert all((root / name).is_file() for name in (COPIED_BEFORE, ON_CPU_ONLY, PLAIN_GROUPED))
