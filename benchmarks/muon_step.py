"""A step of Muon in bfloat16 at ZeRO 1: whole matrices at their owners, beside DeepSpeed's own Muon.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/muon_step.py [--width 1024] [--layers 4] [--processor-time]

A step is the sum of gradients over data-parallel ranks, the update, and the exchange of weights; the gradients are
trivial. A layer has the four matrices of attention and of an MLP. The two take turns in one world, so that a machine
whose speed drifts slows both; the figure is the median of the ratios of neighbouring steps. --processor-time counts
what rank 0 computes, not how long it waits.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.distributed.init import init_distributed, shutdown
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import barrier, device
from megatron.engine.deepspeed_setup import silence_deepspeed
from megatron.engine.muon_step import MuonStep
from megatron.optim import muon
from megatron.optim.builder_args import OptimizerArgs

LR = 1e-4
ZERO_1 = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1.0,
}


class Matrices(Module):
    """The matrices of some layers, and a vector."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
        self.matrices = ParameterList([Parameter(torch.randn(shape) * 0.02) for shape in shapes])
        self.vector = Parameter(torch.ones(width))

    def forward(self, factor: Tensor) -> Tensor:
        """Returns a sum over all elements."""
        return torch.stack([one.sum() for one in self.parameters()]).sum() * factor


def stepper(engine: Any, clock: Callable[[], float]) -> Callable[[], float]:
    """Returns a function that makes a step and returns its time [s].

    Args:
        engine: DeepSpeed's.
        clock: seconds.
    """

    def run() -> float:
        loss = engine(torch.ones((), dtype=torch.bfloat16, device=device()))
        barrier()
        start = clock()
        engine.backward(loss)
        engine.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - start

    return run


def ours(model: Matrices, topology: Topology) -> Any:
    """Returns an engine with whole matrices at their owners."""
    groups = [{"params": [*model.matrices], "weight_decay": 0.1}, {"params": [model.vector], "weight_decay": 0.0}]
    optimizer = muon.build(groups, OptimizerArgs(LR, topology, {"adjust_lr_fn": "original"}, flat_partitions=True))
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO_1, mpu=topology)
    engine.optimizer.step = MuonStep(engine.optimizer, topology)
    return engine


def theirs(model: Matrices) -> Any:
    """Returns an engine with DeepSpeed's Muon, which finds the ranks itself."""
    for parameter in model.parameters():
        parameter.use_muon = parameter.dim() == 2  # type: ignore[attr-defined]
    matrices = {"params": [*model.matrices], "use_muon": True, "lr": LR, "momentum": 0.95, "ns_method": "standard"}
    vector = {"params": [model.vector], "use_muon": False, "lr": LR, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = MuonWithAuxAdam([{**matrices, "weight_decay": 0.1}, {**vector, "weight_decay": 0.0}])
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO_1)
    return engine


def main() -> None:
    """Prints the median times and their ratio, on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    silence_deepspeed()
    torch.compiler.set_stance("force_eager")  # DeepSpeed compiles its iterations, which takes minutes on a CPU
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1)
    torch.manual_seed(1)
    steps = {
        "deepspeed": stepper(theirs(Matrices(args.width, args.layers)), clock),
        "here": stepper(ours(Matrices(args.width, args.layers).bfloat16().to(device()), topology), clock),
    }
    for run in steps.values():
        run()
    times = [{name: run() for name, run in steps.items()} for _ in range(args.pairs)]
    if topology.rank == 0:
        for name in steps:
            print(f"{name:<10}{1000 * statistics.median(pair[name] for pair in times):>10.1f} ms")
        ratio = statistics.median(pair["here"] / pair["deepspeed"] for pair in times)
        print(f"a step takes {ratio:.3f} of the time of DeepSpeed's, {topology.world_size} ranks")
    shutdown()


if __name__ == "__main__":
    main()
