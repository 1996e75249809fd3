"""Training speed of a Llama on one GPU: tokens/s, model FLOPs utilisation, peak memory and kernels a step.

    python benchmarks/gpu.py [--models 124M,1B] [--minutes 6] [--write docs/performance.md]
    python benchmarks/gpu.py --plan

Contenders run one after another in one process, same shapes and batches: ours (eager and compiled, bfloat16 and FP8),
transformers' model (eager and compiled), a plain torch loop under torch.compile, and torchtitan's model where its
package is installed. Utilisation is against the dense bfloat16 peak that is printed, by the FLOP count of
megatron/plan/flops.py. `--plan` needs no GPU and says what would run and what has to be installed. `--models tiny`
runs on a CPU what a CPU can run.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import Shape, Step
from benchmarks.llama_contenders import (
    our_config,
    ours,
    plain_torch,
    torchtitan,
    transformers_llama,
)
from benchmarks.tables import write_between
from megatron.distributed.init import shutdown
from megatron.distributed.process_group import device
from megatron.metrics.memory import peak_memory_bytes
from megatron.metrics.peak_flops import find_peak
from megatron.param_table import ModelDims, tensors
from megatron.plan.flops import flops_per_iteration
from megatron.registry.fp8 import FP8_RECIPES

MODELS = {
    "tiny": Shape(layers=2, hidden=64, heads=4, sequence=64, micro_batch=2, vocabulary=512),
    "124M": Shape(layers=12, hidden=768, heads=12, sequence=1024, micro_batch=32, vocabulary=50304),
    "1B": Shape(layers=16, hidden=2048, heads=16, sequence=2048, micro_batch=8, vocabulary=50304),
}
WARM_UP = 4
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "torchtitan", "flash-attn")
Capability = tuple[int, int] | None
"""Compute capability of a GPU; None for a CPU."""
PLANNED = (9, 0)
"""The GPU that `--plan` is for."""
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    """Its name in the table."""
    make: Callable[[Shape], Step]
    """Builds its step."""
    unavailable: Callable[[Capability], str | None] = lambda _found: None
    """Returns the reason why it cannot run on such a device, or None."""


def this_device() -> Capability:
    """Returns the compute capability of the GPU; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def compiler_unavailable(found: Capability) -> str | None:
    """Returns the reason why torch.compile is not measured, or None."""
    return None if found is not None else "not every g++ compiles its bfloat16 code for a CPU"


def fp8_unavailable(recipe: str, found: Capability) -> str | None:
    """Returns the reason why a recipe is not measured, or None."""
    if found is None:
        return "a CPU only emulates it"
    need = FP8_RECIPES[recipe].capability
    return None if found >= need else f"it needs compute capability {need}, and this GPU has {found}"


def titan_unavailable(found: Capability) -> str | None:
    """Returns the reason why torchtitan's model is not measured, or None."""
    if find_spec("torchtitan") is None:
        return "the package torchtitan is not installed"
    return None if found is not None else "its attention is compiled for a GPU"


def contenders() -> Iterator[Contender]:
    """Yields what is compared, the rows that matter most first."""
    yield Contender("ours, compile", partial(ours, compiled=True), compiler_unavailable)
    yield Contender("torchtitan, compile", torchtitan, titan_unavailable)
    yield Contender("ours", ours)
    yield Contender("plain torch, compile", plain_torch, compiler_unavailable)
    for recipe in FP8_RECIPES:
        why_not = partial(fp8_unavailable, recipe)
        yield Contender(f"ours, compile, fp8 {recipe}", partial(ours, compiled=True, fp8=recipe), why_not)
    yield Contender("ours, fp8 tensorwise", partial(ours, fp8="tensorwise"), partial(fp8_unavailable, "tensorwise"))
    yield Contender("transformers, compile", partial(transformers_llama, compiled=True), compiler_unavailable)
    yield Contender("transformers", transformers_llama)


def flops_per_token(shape: Shape) -> float:
    """Forward and backward, without recomputation [FLOP/token]."""
    config = our_config(shape)
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    table = tensors(dims, shape.vocabulary)
    return flops_per_iteration(dims, table, seq_length=shape.sequence, train_batch_size=1) / shape.sequence


@dataclass(frozen=True)
class Measured:
    """What was measured of one contender."""

    seconds: float
    """Median wall time of a step [s]."""
    memory: int
    """Peak memory of the step [bytes]."""
    kernels: int
    """Kernels that one step starts on the GPU; 0 on a CPU."""


def measure(make: Callable[[Shape], Step], shape: Shape, steps: int) -> Measured:
    """Runs one contender; everything is freed afterwards."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make(shape)
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    peak = peak_memory_bytes(device())
    kernels = count_kernels(step)
    del step
    gc.collect()
    return Measured(statistics.median(times), peak, kernels)


def count_kernels(step: Step) -> int:
    """Kernels that one step starts on the GPU, copies and fills included."""
    if not torch.cuda.is_available():
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(1 for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def rows(models: list[str], steps: int, minutes: float, peak: float) -> Iterator[str]:
    """Yields a table row for each model and contender, also for those that cannot run or have no time left.

    Args:
        models: Names of MODELS.
        steps: Steps that are timed.
        minutes: No contender starts after that time.
        peak: Of the device [FLOP/s].
    """
    end = time.monotonic() + 60 * minutes
    for model in models:
        shape = MODELS[model]
        for contender in contenders():
            reason = contender.unavailable(this_device())
            if reason is None and time.monotonic() > end:
                reason = f"no time left of {minutes:g} minutes"
            if reason is None:
                try:
                    found = measure(contender.make, shape, steps)
                except Exception as error:  # noqa: BLE001 (a contender that fails must not end the others)
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if reason is not None:
                yield f"| {model} | {contender.name} | not run: {reason} | | | |"
                continue
            rate = shape.tokens / found.seconds
            share = rate * flops_per_token(shape) / peak
            yield (
                f"| {model} | {contender.name} | {rate:,.0f} | {share:.1%} | {found.memory / 2**30:.1f} GiB "
                f"| {found.kernels or ''} |"
            )


def versions() -> dict[str, str | None]:
    """Returns package -> version, or None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def plan(models: list[str], steps: int) -> Iterator[str]:
    """Yields what would run on a GPU, and what has to be installed for it."""
    yield f"on a GPU of compute capability {PLANNED[0]}.{PLANNED[1]}, with the packages of this environment:"
    for name, version in versions().items():
        yield f"    {name:14s} {version or 'not installed'}"
    for model in models:
        shape = MODELS[model]
        yield (
            f"{model}: {shape.layers} blocks x {shape.hidden}, {shape.tokens:,} tokens a step, "
            f"{flops_per_token(shape):.3g} FLOP a token; {WARM_UP} + {steps} + 1 steps of each contender"
        )
        for contender in contenders():
            reason = contender.unavailable(PLANNED)
            yield f"    {contender.name:32s} {'runs' if reason is None else f'does not run: {reason}'}"


def main() -> None:
    """Prints the plan, or the table, which it may also write into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--models", default="124M,1B", help=f"comma list of {', '.join(MODELS)}")
    parser.add_argument("--minutes", type=float, default=6.0, help="no contender starts after that time")
    parser.add_argument("--write", type=Path, help=f"page whose part between {BEGIN} and {END} becomes the table")
    parser.add_argument("--plan", action="store_true", help="say what would run, and run nothing")
    options = parser.parse_args()
    models = options.models.split(",")
    if options.plan:
        print("\n".join(plan(models, options.steps)))
        return
    peak = find_peak(device(), torch.bfloat16)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = ", ".join(f"{package} {version}" for package, version in versions().items() if version)
    lines = [
        f"{name}, {time.strftime('%Y-%m-%d')}, peak {peak}; {packages}.",
        "",
        "| model | contender | tokens/s | MFU | peak memory | kernels a step |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for row in rows(models, options.steps, options.minutes, peak.flops_per_second):
        lines.append(row)
        print(row, flush=True)
        if options.write is not None:  # what is measured stays, whatever happens to the next
            write_between(options.write, BEGIN, END, lines)
    shutdown()


if __name__ == "__main__":
    main()
