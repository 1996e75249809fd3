"""What a checkpoint needs of an engine, and how all ranks agree on a failure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from megatron.checkpoint.format.optimizer_shards import OptimizerShard, OptimizerState
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import any_rank
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.errors import RunError


class Checkpointable(Protocol):
    """An engine, as the checkpoint sees it. Keys are "<layer>.<name>"."""

    @property
    def topology(self) -> Topology: ...

    @property
    def pipelined(self) -> bool:
        """Whether weights are stored a layer a file."""

    @property
    def random(self) -> TensorParallelRNG:
        """The generator for draws on tensors that are cut over tensor-parallel ranks."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores [b, s, v] of tokens [b, s], fp32; collective."""

    def weights(self) -> dict[str, Tensor]:
        """This rank's tensor-parallel shards of the layers it holds, where it is the first data rank; collective."""

    def saved_weights(self) -> AbstractContextManager[None]:
        """Returns a context in which `weights` are those that checkpoints have; collective."""

    def optimizer_shards(self) -> list[OptimizerShard]:
        """What this rank's part of the optimizer keeps; a slice that another rank also has is left out."""

    def loss_scaling(self) -> dict[str, float]:
        """Where a moving loss scale stands, as plain numbers; empty where there is none."""

    def load_loss_scaling(self, stored: Mapping[str, float]) -> None:
        """Restores a dynamic loss scale."""

    def load_optimizer(self, state: OptimizerState) -> None:
        """Puts the optimizer where `state` was."""


def together(action: Callable[[], None], what: str) -> None:
    """Runs an action on every rank; if it fails on any, every rank raises RunError. Ends like a barrier.

    what: the action in words, for the message. Only errors of the file system are caught: an OSError, torch's
    RuntimeError when a write falls short, or a RunError that reports one.
    """
    error: Exception | None = None
    try:
        action()
    except (OSError, RuntimeError, RunError) as caught:
        error = caught
    failed = any_rank(error is not None)
    if isinstance(error, RunError):
        raise error
    if failed:
        reason = str(error).splitlines()[0] if error else "another rank failed"
        raise RunError.of(f"{what} failed: {reason}", hint="the checkpoints written before are complete") from error


def run_with_heartbeat(action: Callable[[], None], what: str, beat: float = 5.0) -> None:
    """The same for what may take longer than a collective may wait: the ranks meet every `beat` [s] until all are done.

    The action runs in a thread, so it is none that needs a GPU.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            action()
        except (OSError, RuntimeError, RunError) as caught:
            errors.append(caught)

    def publish() -> None:
        if errors:
            raise errors[0]

    thread = threading.Thread(target=run, name="checkpoint-wait", daemon=True)
    thread.start()
    while True:
        thread.join(beat)
        if not any_rank(thread.is_alive()):
            break
    together(publish, what)
