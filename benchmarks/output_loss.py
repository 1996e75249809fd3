"""The output layer and loss in blocks of tokens beside all logits at once: tokens per second and memory of a step.

    python benchmarks/output_loss.py [--vocabulary 131072] [--pairs 5]

Both are our training step in one process, with the same model and batch; steps alternate, and the figure is the median
of the ratios of neighbouring steps. The allocator is set as the launcher sets it for workers on CPUs. Memory is that of
all tensors alive, counted at every operation of one more step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import shutdown
from megatron.engine.builder import build_training_engine, init_topology
from megatron.launcher.commands.local import KEEP_FREED_MEMORY
from megatron.plan import make_plan

Step = Callable[[], None]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, and the most that were alive at a time."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.now = self.most = before
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)}
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage(), given)
        self.most = max(self.most, self.now)
        return made

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def step_of(arguments: argparse.Namespace, *, fused: bool) -> tuple[Step, int, int]:
    """A training step, the bytes of its parameters and optimizer state, and the plan's bytes of the rank."""
    settings = {
        "num_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_attention_heads": 8,
        "seq_length": arguments.sequence,
        "pos_emb": "rotary",
        "padded_vocab_size": arguments.vocabulary,
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "train_iters": 10,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
        "fused_linear_cross_entropy": fused,
    }
    resolution = resolve([], settings, Resources(1))
    config = resolution.config
    engine = build_training_engine(config, init_topology(config), padded_vocab_size=arguments.vocabulary)
    tokens = torch.randint(0, arguments.vocabulary, (arguments.micro_batch, arguments.sequence))
    batch = MicroBatch(tokens, tokens, torch.ones(tokens.shape))

    def step() -> None:
        engine.train_step(iter([batch]), 1e-3)

    step()  # makes the optimizer's state
    parameters = list(engine.deepspeed.module.parameters())
    state = [one for values in engine.deepspeed.optimizer.state.values() for one in values.values()]
    held = sum(one.nbytes for one in (*parameters, *state) if isinstance(one, Tensor))
    return step, held, sum(make_plan(resolution).json()["memory_per_rank_bytes"].values())


def seconds(step: Step) -> float:
    """Wall time of one step."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> None:
    """Prints the ratio of speeds and the memory of both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument, type=int)
    for name, value in {"vocabulary": 131_072, "sequence": 2048, "micro-batch": 2, "hidden": 256, "layers": 4}.items():
        add(f"--{name}", default=value)
    add("--pairs", default=5)
    arguments = parser.parse_args()
    if not KEEP_FREED_MEMORY.keys() <= os.environ.keys():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**KEEP_FREED_MEMORY, **os.environ})
    built = {fused: step_of(arguments, fused=fused) for fused in (True, False)}
    times = [(seconds(built[True][0]), seconds(built[False][0])) for _ in range(arguments.pairs)]
    ratio = statistics.median(other / ours for ours, other in times)
    print(f"tokens/s in blocks: {ratio:.3f}x of all logits at once (median of {arguments.pairs} pairs)")
    peaks = {}
    for fused, (step, held, planned) in built.items():
        live = LiveBytes(held)
        with live:
            step()
        peaks[fused] = live.most
        name = "in blocks" if fused else "at once"
        print(f"{name:10s} peak {live.most / 2**20:,.0f} MiB, planned {planned / 2**20:,.0f}")
    print(f"memory in blocks: {peaks[True] / peaks[False]:.3f}x")
    shutdown()


if __name__ == "__main__":
    main()
