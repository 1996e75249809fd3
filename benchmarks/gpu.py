"""Training speed on one GPU: tokens/s, model FLOPs utilisation and peak memory, beside transformers.

    python benchmarks/gpu.py [--steps 20] [--models 124M,1B]

Three contenders in one process, one after another, same shapes and precision (bfloat16, fp32 master weights): our
engine through DeepSpeed, a plain loop over transformers' GPT-NeoX, and that loop under torch.compile. Utilisation is
against the dense bfloat16 peak that is printed, by the FLOP count of megatron/plan/flops.py. `--models tiny` runs
the same on a CPU, to see that it runs; without the compiled contender, whose bfloat16 code not every g++ takes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import Shape, Step, ours, transformers_loop
from megatron.distributed.init import shutdown
from megatron.distributed.process_group import device
from megatron.metrics.memory import peak_memory_bytes
from megatron.metrics.peak_flops import find_peak
from megatron.param_table import ModelDims, tensors
from megatron.plan.flops import flops_per_iteration

MODELS = {
    "tiny": Shape(layers=2, hidden=64, heads=4, sequence=64, micro_batch=2, vocabulary=512),
    "124M": Shape(layers=12, hidden=768, heads=12, sequence=1024, micro_batch=32, vocabulary=50304),
    "1B": Shape(layers=16, hidden=2048, heads=16, sequence=2048, micro_batch=8, vocabulary=50304),
}
WARM_UP = 5

CONTENDERS: dict[str, Callable[[Shape, str], Step]] = {
    "ours": ours,
    "ours, compile": partial(ours, compiled=True),
    "transformers": transformers_loop,
    "transformers, torch.compile": partial(transformers_loop, compiled=True),
}


def flops_per_token(shape: Shape) -> float:
    """Forward and backward, without recomputation [FLOP/token]."""
    dims = ModelDims(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        mlp_width=4 * shape.hidden,
        pos_emb="rotary",
        tied=False,
    )
    table = tensors(dims, shape.vocabulary)
    return flops_per_iteration(dims, table, seq_length=shape.sequence, train_batch_size=1) / shape.sequence


def measure(make: Callable[[Shape, str], Step], shape: Shape, steps: int) -> tuple[float, int]:
    """Median seconds of a step and peak memory [bytes]; everything is freed afterwards."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make(shape, "bfloat16")
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    peak = peak_memory_bytes(device())
    del step
    gc.collect()
    return statistics.median(times), peak


def main() -> None:
    """Prints a table row for each model and contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--models", default="124M,1B", help=f"comma list of {', '.join(MODELS)}")
    options = parser.parse_args()
    peak = find_peak(device(), torch.bfloat16)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}, peak {peak}")
    print("| model | contender | tokens/s | MFU | peak memory |\n|---|---|---|---|---|")
    for model in options.models.split(","):
        shape = MODELS[model]
        for contender, make in CONTENDERS.items():
            if "compile" in contender and not torch.cuda.is_available():
                continue
            seconds, memory = measure(make, shape, options.steps)
            rate = shape.tokens / seconds
            share = rate * flops_per_token(shape) / peak.flops_per_second
            print(f"| {model} | {contender} | {rate:,.0f} | {share:.1%} | {memory / 2**30:.1f} GiB |", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
