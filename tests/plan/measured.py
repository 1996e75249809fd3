"""Memory of a training step, counted in the storages of live tensors, beside the plan's figures.

    python -m tests.plan.measured

prints the table of docs/parallelism.md. States (parameters, gradients, optimizer) are counted when the optimizer
begins its second step; activations are what autograd keeps of one forward pass.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from megatron.config import Config, Resources, resolve
from megatron.data.batch import MicroBatch
from megatron.engine.build import build_training_engine
from megatron.parallel.bootstrap import bootstrap
from megatron.plan.memory import Memory
from megatron.plan.parameters import model_tensors
from megatron.plan.report import bounds_of, memory_of
from tests.distributed import run_distributed
from tests.end_to_end.runs import BASE

VOCABULARY = 512
LARGER: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_kv_heads": 8,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": 4,
    "vocab_size": VOCABULARY,
    "zero_optimization": {"stage": 0, "reduce_bucket_size": 1000},
}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks, ZeRO 0": (2, {}),
    "ZeRO 1": (2, {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}),
    "ZeRO 2": (2, {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}),
    "ZeRO 3": (2, {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}),
    "tensor 2": (2, {"model_parallel_size": 2}),
    "tensor 2, sequence": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "context 2": (2, {"context_parallel_size": 2}),
    "every block recomputed": (2, {"checkpoint_activations": True}),
    "attention core recomputed": (2, {"recompute_granularity": "selective"}),
}


def configuration(world_size: int, settings: dict[str, Any]) -> Config:
    return resolve([], {**BASE, **LARGER, **settings}, Resources(world_size)).config


def live_bytes() -> int:
    """The storages of all tensors that exist, each counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def measure(rank: int, world_size: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes of states and of activations on this rank."""
    before = live_bytes()
    config = configuration(world_size, settings)
    axes = config.parallelism
    topology = bootstrap(
        pipe_parallel_size=0,
        model_parallel_size=axes.model_parallel_size,
        context_parallel_size=axes.context_parallel_size,
        sequence_parallel=axes.sequence_parallel,
        seed=1,
    )
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
    ids = torch.randint(0, VOCABULARY, (4, 129))
    batch = MicroBatch(ids[:, :-1].clone(), ids[:, 1:].clone(), torch.ones(4, 128))
    states: list[int] = []
    inner = getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)
    inner.register_step_pre_hook(lambda *_: states.append(live_bytes() - before))
    for _ in range(2):
        engine.train_step(iter([batch]), 1e-3)
    return states[-1], kept_bytes(engine, batch)


def kept_bytes(engine: Any, batch: MicroBatch) -> int:
    """What autograd keeps of a forward pass, parameters apart, and the logits, which the loss keeps by itself."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in engine.parameters.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    engine.deepspeed.module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = engine._forward(batch)
    logits = loss.grad_fn
    while logits is not None and not hasattr(logits, "gradient"):
        logits = logits.next_functions[0][0] if logits.next_functions else None
    if logits is not None:
        storage = logits.gradient.untyped_storage()
        kept[storage.data_ptr()] = storage
    return sum(storage.nbytes() for storage in kept.values())


def planned(world_size: int, settings: dict[str, Any]) -> Memory:
    """The plan's figures of a rank."""
    config = configuration(world_size, settings)
    table = model_tensors(config, VOCABULARY)
    return memory_of(config, table, VOCABULARY, bounds_of(config, table))


def main() -> None:
    """Prints the table."""
    mib = 2**20
    print("| layout | states, planned | measured | activations, planned | measured |")
    print("|---|---|---|---|---|")
    for name, (world_size, settings) in CASES.items():
        plan = planned(world_size, settings)
        states, activations = run_distributed(measure, world_size, settings)[0]
        figures = (plan.total - plan.activations, states, plan.activations, activations)
        print(f"| {name} | {' | '.join(f'{figure / mib:.1f} MiB' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
