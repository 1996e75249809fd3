"""Forward and backward passes of a model whose ranks share sequences, by each method of context parallelism.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py [--length 4096] [--bf16] [--processor-time]

The ranks of one world take the methods in turn (exchange of heads, ring, ...), so that a machine whose speed drifts
slows both; the figure is the median of the ratios of neighbouring passes. Width 512, 8 heads, 4 key heads, micro batch
1; --processor-time counts what rank 0 computes, not how long it waits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config import Config, Resources, resolve
from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.init import init_distributed, shutdown
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import barrier, device
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel

WIDTH, HEADS, KEY_HEADS, VOCABULARY = 512, 8, 4, 512


def configured(length: int, layers: int) -> Config:
    """Returns the configuration of the model."""
    values = {
        "num_layers": layers,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_kv_heads": KEY_HEADS,
        "seq_length": length,
        "max_position_embeddings": length,
        "pos_emb": "rotary",
        "norm": "rmsnorm",
        "train_micro_batch_size_per_gpu": 1,
        "train_iters": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
        "tokenizer_type": "CharLevelTokenizer",
    }
    return resolve([], values, Resources(1)).config


def passes(config: Config, topology: Topology, dtype: torch.dtype, clock: Callable[[], float]) -> Callable[[], float]:
    """Returns a function that runs both passes over this rank's shard of a sequence, and returns the time [s].

    Args:
        config: the model.
        topology: who exchanges heads, and who forms a ring.
        dtype: type of the parameters.
        clock: seconds.
    """
    spec = ModelSpec(
        config.model,
        config.initialization,
        config.kernels,
        padded_vocab_size=VOCABULARY,
        topology=topology,
        seed=1,
        dtype=dtype,
        device=device(),
    )
    model = SequentialModel(build_layer_specs(spec)).to(device())
    assert config.model.seq_length
    every = torch.arange(config.model.seq_length, device=device())[None] % VOCABULARY
    tokens = SequenceShards.of(topology).shard(every)

    def run() -> float:
        barrier()
        start = clock()
        model(tokens).float().logsumexp(-1).mean().backward()
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        barrier()
        return clock() - start

    return run


def main() -> None:
    """Prints the median times and their ratio, on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="of a sequence [tokens]")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--bf16", action="store_true", help="parameters in bfloat16 instead of fp32")
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    config = configured(args.length, args.layers)
    first = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1)
    size, rank = first.world_size, first.rank
    names = {"ulysses": size, "ring": 1}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    methods = {
        name: passes(
            config,
            Topology.build(pipe=1, model=1, context=size, rank=rank, world_size=size, ulysses=groups),
            dtype,
            clock,
        )
        for name, groups in names.items()
    }
    for _ in range(2):
        for run in methods.values():
            run()
    times = [{name: run() for name, run in methods.items()} for _ in range(args.pairs)]
    if rank == 0:
        for name in names:
            print(f"{name:<10}{1000 * statistics.median(pair[name] for pair in times):>10.1f} ms")
        ratio = statistics.median(pair["ulysses"] / pair["ring"] for pair in times)
        print(f"ring is {ratio:.3f} times as fast as ulysses, {size} ranks, {args.length} tokens, {dtype}")
    shutdown()


if __name__ == "__main__":
    main()
