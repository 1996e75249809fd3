"""What `deterministic: true` costs: the training step and single operations, with and without it, in one run.

    python benchmarks/determinism.py [--pairs 15] [--model 124M]

Steps with and without take turns in one process, so that both meet the same machine; the figure is the median of the
ratios of neighbours. On a GPU the operations are those whose fast form adds in no fixed order.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # both sides: it is read once, when cuBLAS starts

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import Shape, ours
from benchmarks.gpu import MODELS as FOR_GPUS
from megatron.distributed.init import shutdown
from megatron.distributed.process_group import device

Work = Callable[[], object]
WARM_UP = 3
MODELS = {"small": Shape(layers=4, hidden=256, heads=8, sequence=512, micro_batch=4, vocabulary=4096), **FOR_GPUS}


def operations() -> dict[str, Work]:
    """Operations with a deterministic form of their own, forward and backward."""
    here = device()
    dtype = torch.bfloat16 if here.type == "cuda" else torch.float32
    ids = torch.randint(0, 4096, (8192,), device=here)
    table = torch.randn(4096, 256, device=here, dtype=dtype, requires_grad=True)
    q, k, v = torch.randn(3, 4, 8, 512, 64, device=here, dtype=dtype, requires_grad=True).unbind(0)
    target = torch.zeros(4096, 256, device=here)
    values = torch.randn(8192, 256, device=here)

    def embedding() -> None:
        F.embedding(ids, table).sum().backward()

    def attention() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    return {
        "embedding, backward": embedding,
        "attention, backward": attention,
        "index_add": lambda: target.index_add(0, ids, values),
        "empty tensors (filled when deterministic)": lambda: torch.empty(1 << 22, device=here),
    }


def seconds(work: Work, deterministic: bool) -> float:
    """One call, waited for."""
    torch.use_deterministic_algorithms(deterministic)
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def cost(work: Work, pairs: int) -> tuple[float, float]:
    """The median ratio of neighbours, and the median seconds without."""
    for _ in range(WARM_UP):
        seconds(work, False), seconds(work, True)
    plain, ratios = [], []
    for number in range(pairs):
        order = (False, True) if number % 2 else (True, False)
        found = {deterministic: seconds(work, deterministic) for deterministic in order}
        plain.append(found[False])
        ratios.append(found[True] / found[False])
    return statistics.median(ratios), statistics.median(plain)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="measurements of each, with and without")
    parser.add_argument("--model", choices=MODELS, help="whose training step; 124M on a GPU, small elsewhere")
    asked = parser.parse_args()
    name = asked.model or ("124M" if torch.cuda.is_available() else "small")
    precision = "bfloat16" if torch.cuda.is_available() else "fp32"
    works: dict[str, Work] = {f"training step, {name}, {precision}": ours(MODELS[name], precision), **operations()}
    print(f"on {device()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'what':45} {'with / without':>14} {'without [ms]':>13}")
    for what, work in works.items():
        ratio, plain = cost(work, asked.pairs)
        print(f"{what:45} {ratio:14.2f} {1000 * plain:13.2f}", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
