"""Counts what a rank really holds while it trains: every storage alive, by component, on any layout.

Storages are followed from the operation that makes them to their end, so tensors that only autograd's graph holds are
counted as well. State is counted when the optimizer steps; activations at the end of every block and of the output
layer, in the forward pass and wherever the backward pass repeats one, so that temporary buffers of single operations
stay out.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.tensor_parallel import linear_cross_entropy
from megatron.engine.builder import build_training_engine, init_topology
from megatron.model.block import Block
from megatron.model.head import Head
from megatron.model.mlp.dense import ParallelMLP
from megatron.model.moe.experts import ExpertStack

Storages = dict[int, int]
"""Address of a storage -> its size [bytes]."""


class LiveStorages(TorchDispatchMode):
    """Follows the storages that operations make while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._alive[storage._cdata] = weakref.ref(storage)
        return made

    def sizes(self) -> Storages:
        """What is alive now."""
        found = (reference() for reference in self._alive.values())
        return {one.data_ptr(): one.nbytes() for one in found if one is not None and one.nbytes()}


def storages(tensors: Iterable[Tensor]) -> Storages:
    """The storages behind tensors, each once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {one.data_ptr(): one.nbytes() for one in found if one.nbytes()}


class Ledger:
    """The largest sizes seen of each component [bytes]."""

    def __init__(self, engine: Any, live: LiveStorages) -> None:
        self._engine, self._live, self._base = engine.deepspeed, live, engine.stored_base.values()
        self._before = _everything()  # what is alive before the step is no activation of it
        self.parameters = self.gradients = self.optimizer = self.activations = 0

    def look(self, *_: Any) -> None:
        """A block or the output layer has done its forward pass, or a backward pass is over."""
        alive, parameters, gradients = self._live.sizes(), self._parameters(), self._gradients()
        mine = alive.keys() - self._before.keys() - gradients.keys() - parameters.keys()
        self.activations = max(self.activations, sum(alive[key] for key in mine))
        self.parameters = max(self.parameters, sum(parameters.values()))
        self.gradients = max(self.gradients, sum(gradients[key] for key in gradients.keys() - parameters.keys()))

    def at_step(self, *_: Any) -> None:
        """The optimizer steps."""
        parameters, optimizer, gradients = self._parameters(), self._optimizer(), self._gradients()
        self.optimizer = max(self.optimizer, sum(optimizer[key] for key in optimizer.keys() - parameters.keys()))
        self.gradients = max(self.gradients, sum(gradients[key] for key in gradients.keys() - parameters.keys()))

    def _parameters(self) -> Storages:
        held = list(self._engine.module.parameters())
        parts = [getattr(one, name, None) for one in held for name in ("ds_tensor", "ds_secondary_tensor")]
        few = [part for weight in self._base for part in weight.matrix.stored()]
        return storages([*(one.data for one in held), *few]) | storages(part for part in parts if part is not None)

    def _optimizer(self) -> Storages:
        optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        masters = [one for group in optimizer.param_groups for one in group["params"]]
        return storages(_tensors([masters, [list(values.values()) for values in optimizer.state.values()]]))

    def _gradients(self) -> Storages:
        """Gradients of parameters and of masters, and what DeepSpeed's optimizers collect them in."""
        outer = self._engine.optimizer
        inner = getattr(outer, "optimizer", outer)
        masters = [one.grad for group in inner.param_groups for one in group["params"]]
        owners = [one.grad for one in self._engine.module.parameters()]
        buckets = [bucket.buffer for bucket in getattr(outer, "ipg_buckets", {}).values()]
        names = (
            "averaged_gradients",
            "all_grad_tensors",
            "grad_partitions_flat_buffer",
            "fp32_groups_gradients_flat",
        )
        return storages(_tensors([owners, masters, buckets, [getattr(outer, name, None) for name in names]]))


def _tensors(nested: Any) -> Iterator[Tensor]:
    """The tensors in lists and mappings of any kind."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        yield from _tensors(list(nested.values()))
    elif isinstance(nested, Iterable) and not isinstance(nested, str):
        for one in nested:
            yield from _tensors(one)


def _everything() -> Storages:
    """Every tensor of numbers that Python can reach."""
    return storages(one for one in gc.get_objects() if isinstance(one, Tensor) and one.is_floating_point())


def count(rank: int, world_size: int, settings: dict[str, Any], vocabulary: int) -> dict[str, int]:
    """Trains two steps of the configured model on random tokens; the bytes of each component in the second."""
    config = resolve([], settings, Resources(world_size)).config
    topology = init_topology(config)
    engine = build_training_engine(config, topology, padded_vocab_size=vocabulary)
    batch, length = config.training.train_micro_batch_size_per_gpu or 0, config.model.seq_length or 0
    tokens = torch.randint(0, vocabulary, (batch, length))
    micro = MicroBatch(tokens, tokens, torch.ones(batch, length))

    def step() -> None:
        engine.train_step(iter([micro] * config.training.gradient_accumulation_steps), 1e-3)

    step()  # makes the optimizer's state
    live = LiveStorages()
    ledger = Ledger(engine, live)
    _watch(engine.deepspeed, ledger)
    with live, looking_between_blocks(ledger):
        step()
    names = ("parameters", "gradients", "optimizer", "activations")
    return {name: getattr(ledger, name) for name in names}


def _watch(engine: Any, ledger: Ledger) -> None:
    """Has the ledger look wherever something is largest."""
    for module in engine.module.modules():
        if isinstance(module, (Block, Head)):
            module.register_forward_hook(ledger.look)
        if isinstance(module, ParallelMLP):  # a repeated block ends here, once it has made all that was not kept
            module.linear2.register_forward_pre_hook(ledger.look)
        if isinstance(module, ExpertStack):
            module.register_forward_hook(ledger.look)
    engine.allreduce_gradients = _after(ledger.look, engine.allreduce_gradients)
    outer = engine.optimizer
    outer.step = _after(ledger.at_step, outer.step)
    if hasattr(outer, "optimizer"):
        outer.optimizer.step = _after(ledger.at_step, outer.optimizer.step)


@contextmanager
def looking_between_blocks(ledger: Ledger) -> Iterator[None]:
    """Has the ledger look while the logits of a block of tokens are there."""
    loss, add = linear_cross_entropy.loss_of_rows, linear_cross_entropy._WeightGradient.add

    def watched_loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        value = loss(logits, *args, **kwargs)
        ledger.look()
        return value

    def watched_add(self: Any, grad: Tensor, x: Tensor, **kwargs: Any) -> None:
        add(self, grad, x, **kwargs)
        ledger.look()

    linear_cross_entropy.loss_of_rows = watched_loss
    linear_cross_entropy._WeightGradient.add = watched_add  # type: ignore[method-assign]
    try:
        yield
    finally:
        linear_cross_entropy.loss_of_rows = loss
        linear_cross_entropy._WeightGradient.add = add  # type: ignore[method-assign]


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both
