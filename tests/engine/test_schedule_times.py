"""Steps of four stages that sleep take as long as the drawn schedules say."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from megatron.config import Resources, resolve
from megatron.engine.base import BaseEngine
from megatron.engine.pipe_stage import ChunkStage
from megatron.kernels import dispatch
from megatron.kernels.linear import LinearKernel, LinearOfOps, LinearOps, choose_linear, linear_ops
from megatron.kernels.weight_gradients import WeightGradients
from megatron.pipe_schedule.layout import PipeLayout
from megatron.pipe_schedule.timing import timeline
from megatron.training import trainer
from megatron.training.trainer import train
from tests.end_to_end.runs import BASE, NeverStop, make_dataset
from tests.multi_rank import run_cases

RANKS, BLOCKS, MICRO_BATCHES, SECONDS = 4, 8, 8, 0.06
CHUNKS = {"1f1b": 1, "interleaved": 2, "zero_bubble": 2, "dualpipev": 2}
SLEEPING = (32, 16)
"""Shape of the weight of each block whose three products sleep."""
INSTRUCTIONS = dict(PipelineEngine._INSTRUCTION_MAP)
SETTINGS: dict[str, Any] = {
    **BASE,
    "num_layers": BLOCKS,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "seq_length": 8,
    "use_bias_in_mlp": False,
    "pipe_parallel_size": RANKS,
    "train_batch_size": MICRO_BATCHES,
    "train_micro_batch_size_per_gpu": 1,
    "train_iters": 2,
    "eval_iters": 0,
    "fused_linear_cross_entropy": False,
}


PASSES = (
    (PipelineEngine, "_exec_forward_pass"),
    (PipelineEngine, "_exec_backward_pass"),
    (ChunkStage, "forward_one_chunk"),
    (ChunkStage, "backward_one_chunk"),
    (ChunkStage, "backward_weight_one_chunk"),
)
"""Methods that run a pass of a micro batch."""


class Clock:
    """Adds up the time that calls of functions take."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its calls timed."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.monotonic()
            result = function(*args, **kwargs)
            self.seconds.append(time.monotonic() - begun)
            return result

        return timed


def sleeping_linear(steps: Clock) -> Callable[..., LinearKernel]:
    """Makes kernels whose products with that weight sleep first, from the second step on."""

    def make(device: torch.device, dtype: torch.dtype, later: WeightGradients | None = None) -> LinearKernel:
        ops = linear_ops(choose_linear(device, dtype))

        def sleep(*shape: int) -> None:
            if shape == SLEEPING and steps.seconds:
                time.sleep(SECONDS)

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            sleep(*weight.shape)
            return ops.product(x, weight, bias)

        def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
            sleep(grad.shape[1], x.shape[1])
            return ops.weight_gradient(grad, x)

        def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
            sleep(*weight.shape)
            return ops.input_gradient(grad, weight)

        return LinearOfOps(LinearOps(product, weight_gradient, input_gradient, later))

    return make


def step_seconds(rank: int, world_size: int, settings: dict[str, Any]) -> tuple[float, float]:
    """Trains, and returns the time of the last step, and the part of it in passes [s]."""
    steps, passes = Clock(), Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose_linear", sleeping_linear(steps))
        patch.setattr(BaseEngine, "train_step", steps.around(BaseEngine.train_step))
        for owner, name in PASSES:
            patch.setattr(owner, name, passes.around(getattr(owner, name)))
        instructions = {kind: getattr(PipelineEngine, run.__name__) for kind, run in INSTRUCTIONS.items()}
        patch.setattr(PipelineEngine, "_INSTRUCTION_MAP", instructions)
        patch.setattr(trainer, "shutdown", lambda: None)
        train(resolve([], settings, Resources(world_size)).config, NeverStop())
    count = len(passes.seconds) // len(steps.seconds)
    return steps.seconds[-1], sum(passes.seconds[-count:])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    """Schedule -> the times of each rank."""
    folder = tmp_path_factory.mktemp("times")
    settings = {**SETTINGS, "data_path": make_dataset(folder)}
    cases = {
        name: (step_seconds, {**settings, "pipe_schedule": name, "log_dir": str(folder / name)}) for name in CHUNKS
    }
    return run_cases(cases, RANKS)


@pytest.mark.parametrize("name", CHUNKS)
def test_bubbles_are_the_drawn_ones(name: str, measured: dict[str, list[tuple[float, float]]]) -> None:
    drawn = timeline(PipeLayout(name, RANKS, CHUNKS[name]), MICRO_BATCHES).bubble
    longest = max(step for step, _ in measured[name])
    busy = sum(passes for _, passes in measured[name])
    assert 1 - busy / (RANKS * longest) == pytest.approx(drawn, abs=0.05)


@pytest.mark.parametrize(("name", "most"), [("interleaved", 0.90), ("zero_bubble", 0.87), ("dualpipev", 0.87)])
def test_steps_are_shorter_than_with_one_stage_a_rank(
    name: str, most: float, measured: dict[str, list[tuple[float, float]]]
) -> None:
    steps = {schedule: max(step for step, _ in times) for schedule, times in measured.items()}
    assert steps[name] <= most * steps["1f1b"], steps
