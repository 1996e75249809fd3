"""Memory of a training step on each layout, counted in the storages of live tensors, beside the plan's figures.

    python -m tests.plan.measured

prints the table of docs/parallelism.md. live.py documents what is counted, and when.
"""

from __future__ import annotations

from typing import Any

from megatron.config import Resources, resolve
from megatron.plan import make_plan
from tests.multi_rank import run_distributed
from tests.plan.live import count
from tests.plan.test_live_memory import BASE, BUCKETS, GATHERED, VOCABULARY

PARTS = ("parameters", "gradients", "optimizer", "activations")
WIDE: dict[str, Any] = {**BASE, "num_layers": 6, "hidden_size": 256, "num_attention_heads": 8}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "data 4, ZeRO 0": (4, {}),
    "data 4, ZeRO 1": (4, {"zero_optimization": {"stage": 1, **BUCKETS}}),
    "data 4, ZeRO 2": (4, {"zero_optimization": {"stage": 2, **BUCKETS}}),
    "data 4, ZeRO 3": (4, {"zero_optimization": {"stage": 3, **BUCKETS, **GATHERED}}),
    "tensor 2": (2, {"model_parallel_size": 2}),
    "tensor 2, sequence": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "context 2": (2, {"context_parallel_size": 2}),
    "context 2, ring": (2, {"context_parallel_size": 2, "context_parallel_method": "ring"}),
    "pipeline 2": (2, {"pipe_parallel_size": 2}),
    "every block recomputed": (1, {"checkpoint_activations": True}),
    "groups of 2 recomputed": (1, {"checkpoint_activations": True, "checkpoint_num_layers": 2}),
    "attention core recomputed": (1, {"recompute_granularity": "selective"}),
    "tensor 2, partitioned": (
        2,
        {"model_parallel_size": 2, "checkpoint_activations": True, "partition_activations": True},
    ),
}


def row(world_size: int, settings: dict[str, Any]) -> list[tuple[int, int]]:
    """(planned, measured) of each part and of their sum, on the rank that holds most [bytes]."""
    found = run_distributed(count, world_size, {**WIDE, **settings}, VOCABULARY)
    most = max(found, key=lambda sizes: sum(sizes.values()))
    planned = make_plan(resolve([], {**WIDE, **settings}, Resources(world_size))).json()["memory_per_rank_bytes"]
    parts = [(planned[part], most[part]) for part in PARTS]
    return [*parts, (sum(plan for plan, _ in parts), sum(live for _, live in parts))]


def main() -> None:
    """Prints the table."""
    print(f"| layout | {' | '.join(PARTS)} | together |")
    print("|---" * (len(PARTS) + 2) + "|")
    for name, (world_size, settings) in CASES.items():
        cells = (f"{plan / 2**20:.1f} / {live / 2**20:.1f}" for plan, live in row(world_size, settings))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
