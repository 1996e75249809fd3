"""Reads and writes the optimizer state of DeepSpeed's optimizers, by parameter and range.

Under ZeRO an optimizer has flat tensors that contain partitions of many parameters. DeepSpeed records the location of
each parameter's partition: `_hp_mapping` at ZeRO 1 and 2 and in its bf16 optimizer, `grad_position` at ZeRO 3. Without
ZeRO the optimizer has the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.nn import Parameter

from megatron.checkpoint.format.optimizer_shards import EMA, MASTER, TRAINED, OptimizerShard, OptimizerState
from megatron.distributed.param_attrs import expert_rank_and_size
from megatron.optim.builder_args import STEP
from megatron.optim.onebit import SERVER_ERROR, WORKER_ERROR, OnebitAdam
from megatron.optim.state_io import TensorState, read_state, write_state
from megatron.optim.unsharded import AssignedTensor

_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's dynamic loss scale."""
RANKED = (WORKER_ERROR, SERVER_ERROR)
"""State that differs between data-parallel ranks."""


class StoredAverage(Protocol):
    """An average of the weights, as its checkpoint needs it."""

    @property
    def name(self) -> str:
        """Name in checkpoints."""

    def stored(self, owner: Tensor) -> Tensor | None:
        """Returns the tensor to save beside the state of a tensor that the optimizer updates; None for none."""

    def restored(self, owner: Tensor) -> Tensor:
        """Returns the tensor into which stored values are read."""


@dataclass(frozen=True)
class ShardRef:
    """The range of one parameter that this rank's optimizer updates."""

    key: str
    """Key of the parameter in the parameter table."""
    parameter: Parameter
    """The parameter."""
    start: int
    """Start of the range in the flattened parameter."""
    stop: int
    """End of the range."""
    owner: Tensor
    """Tensor that the optimizer steps."""
    offset: int
    """Start of the range in the flattened owner."""
    base: int = 0
    """Start of the parameter in the flattened tensor-parallel shard, which may hold the experts of other ranks too."""
    in_full: bool = False
    """True if the owner is a full tensor, which no other rank has."""

    def of(self, tensor: Tensor) -> Tensor:
        """Returns this range of a tensor of the owner's shape, flat, as a view."""
        return tensor.view(-1).narrow(0, self.offset, self.stop - self.start)

    @property
    def has_master(self) -> bool:
        """Returns whether the optimizer updates a copy in a higher precision than that of the model."""
        return self.owner.dtype != self.parameter.dtype


def read(
    optimizer: Any, parameters: dict[str, Parameter], *, data_rank: int, average: StoredAverage | None = None
) -> list[OptimizerShard]:
    """Returns the shards that this rank saves, as views.

    Args:
        optimizer: DeepSpeed's or torch's.
        parameters: key -> parameter of this rank's model.
        data_rank: index of this rank among the data-parallel ones.
        average: average of the weights that is saved with the state.
    """
    inner = inner_optimizer(optimizer)
    shards: list[OptimizerShard] = []
    found: dict[Tensor, TensorState] = {}
    for ref in shard_refs(optimizer, parameters, data_rank):
        assigned = getattr(inner, "assigned", {}).get(ref.parameter)
        if assigned is not None:
            shards += _assigned_shards(ref.key, assigned, inner, average)
            continue
        if ref.owner not in found:
            found[ref.owner] = read_state(inner, ref.owner, exclude=RANKED)
        one = found[ref.owner]
        tensors = {name: ref.of(value.contiguous()) for name, value in one.elementwise.items()}
        if ref.has_master:
            tensors[MASTER] = ref.of(ref.owner.detach())
        tensors |= {name: ref.of(value) for name, value in _averaged(average, ref.owner).items()}
        start, stop = ref.base + ref.start, ref.base + ref.stop
        shards.append(OptimizerShard(ref.key, start, stop, one.step, tensors, one.tensor_level))
    if isinstance(inner, OnebitAdam):
        shards += _errors(inner, parameters)
    return shards


@torch.no_grad()
def write(
    optimizer: Any,
    parameters: dict[str, Parameter],
    stored: OptimizerState,
    *,
    model_rank: int,
    model_size: int,
    average: StoredAverage | None = None,
) -> None:
    """Loads stored state into the optimizer, sharded for this rank's layout.

    Args:
        optimizer: DeepSpeed's or torch's.
        parameters: key -> parameter of this rank's model.
        stored: state of a checkpoint.
        model_rank: tensor-parallel rank.
        model_size: number of tensor-parallel ranks.
        average: average of the weights to load with the state; one that is stored and not among it is left out.
    """
    inner = inner_optimizer(optimizer)
    shard = {"model_rank": model_rank, "model_size": model_size}
    filled: dict[Tensor, TensorState] = {}
    for ref in shard_refs(optimizer, parameters, data_rank=0):
        assigned = getattr(inner, "assigned", {}).get(ref.parameter)
        if assigned is not None:
            _write_assigned(ref.key, assigned, inner, stored, average)
            continue
        if ref.owner not in filled:
            filled[ref.owner] = TensorState(stored.step(ref.key), {}, _tensor_level(stored, ref.key, ref.parameter))
        for name in _plain_names(stored, ref.key):
            values = stored.shard(ref.key, name, **shard)[ref.base + ref.start : ref.base + ref.stop]
            if name == MASTER:
                if ref.has_master:
                    ref.of(ref.owner.detach()).copy_(values)
                continue
            if name in (EMA, TRAINED):
                if average is not None and average.name == name:
                    ref.of(average.restored(ref.owner)).copy_(values)
                continue
            elementwise = filled[ref.owner].elementwise
            if name not in elementwise:
                elementwise[name] = torch.zeros_like(ref.owner)
            ref.of(elementwise[name]).copy_(values)
    for owner, found in filled.items():
        if found.elementwise or found.tensor_level:  # an optimizer that has made no update has no state
            write_state(inner, owner, found)
    if isinstance(inner, OnebitAdam):
        _write_errors(inner, parameters, stored, shard)


def read_scaling(optimizer: Any) -> dict[str, float]:
    """Returns the state of a dynamic loss scale; empty without one."""
    scaler = _moving_scaler(optimizer)
    return {name: getattr(scaler, name) for name in _SCALING if hasattr(scaler, name)}


def write_scaling(optimizer: Any, stored: Mapping[str, float]) -> None:
    """Sets the state of a dynamic loss scale; does nothing without one."""
    scaler = _moving_scaler(optimizer)
    for name, value in stored.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _moving_scaler(optimizer: Any) -> Any:
    """Returns the dynamic loss scaler of DeepSpeed's optimizer, or None."""
    for name, moves in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(optimizer, name, None)
        if getattr(scaler, moves, False):
            return scaler
    return None


def _averaged(average: StoredAverage | None, owner: Tensor) -> dict[str, Tensor]:
    """Returns what a checkpoint has of an average, by name."""
    found = None if average is None else average.stored(owner)
    return {} if average is None or found is None else {average.name: found}


def _assigned_shards(
    key: str, assigned: AssignedTensor, inner: torch.optim.Optimizer, average: StoredAverage | None
) -> Iterator[OptimizerShard]:
    """Yields the state of a full tensor on its owner, as the shards of every tensor-parallel rank."""
    if assigned.full is None:
        return
    one = read_state(inner, assigned.full)
    size, base = assigned.full.numel() // assigned.shard.numel(), _base(assigned.shard)
    values = dict(one.elementwise)
    if assigned.across_data:
        values[MASTER] = assigned.full.detach()
    values |= _averaged(average, assigned.full)
    for rank in range(size):
        tensors = {name: assigned.shard_of(value, rank, size).flatten() for name, value in values.items()}
        tensor_level = one.tensor_level if rank == 0 else {}
        stop = base + assigned.shard.numel()
        yield OptimizerShard(key, base, stop, one.step, tensors, tensor_level, model_rank=rank)


def _write_assigned(
    key: str,
    assigned: AssignedTensor,
    inner: torch.optim.Optimizer,
    stored: OptimizerState,
    average: StoredAverage | None,
) -> None:
    if assigned.full is None:
        return
    full = assigned.full
    start = expert_rank_and_size(assigned.shard)[0] * full.numel()
    tensors = {
        name: stored.shard(key, name, model_rank=0, model_size=1)[start : start + full.numel()]
        .view(full.shape)
        .to(full.device)
        for name in _plain_names(stored, key)
        if name != MASTER or assigned.across_data
    }
    if MASTER in tensors:
        full.detach().copy_(tensors.pop(MASTER))
    for name in (EMA, TRAINED):
        values = tensors.pop(name, None)
        if values is not None and average is not None and average.name == name:
            average.restored(full).copy_(values)
    found = TensorState(stored.step(key), tensors, _tensor_level(stored, key, assigned.shard))
    if found.elementwise or found.tensor_level:
        write_state(inner, full, found)


def _tensor_level(stored: OptimizerState, key: str, parameter: Parameter) -> dict[str, Tensor]:
    """Returns tensor-level state on the parameter's device, of a stack of experts the rows of this rank's ones."""
    rank, size = expert_rank_and_size(parameter)
    found = stored.tensor_level_state(key)
    return {
        name: (value if size == 1 else value.chunk(size)[rank]).to(parameter.device) for name, value in found.items()
    }


def _plain_names(stored: OptimizerState, key: str) -> list[str]:
    """Returns the names of stored state that does not belong to single data-parallel ranks."""
    return [name for name in stored.names(key) if not name.startswith(RANKED)]


def _errors(inner: OnebitAdam, parameters: dict[str, Parameter]) -> Iterator[OptimizerShard]:
    """Yields the compression errors: each rank's worker error, and its range of the server error."""
    for key, parameter in parameters.items():
        state = inner.state.get(parameter, {})
        if WORKER_ERROR not in state:
            continue
        own = {f"{WORKER_ERROR}.{inner.data_rank}": state[WORKER_ERROR].flatten()}
        start, stop = inner.server_range(parameter)
        yield OptimizerShard(key, 0, parameter.numel(), int(state[STEP]), own)
        if start < stop:
            yield OptimizerShard(key, start, stop, int(state[STEP]), {SERVER_ERROR: state[SERVER_ERROR]})


def _write_errors(
    inner: OnebitAdam, parameters: dict[str, Parameter], stored: OptimizerState, shard: dict[str, int]
) -> None:
    """Loads the compression errors.

    If the number of data-parallel ranks changed, each gets the mean of the worker errors, which preserves the error of
    the mean momentum.
    """
    for key, parameter in parameters.items():
        names = [name for name in stored.names(key) if name.startswith(WORKER_ERROR)]
        if not names:
            continue
        own = f"{WORKER_ERROR}.{inner.data_rank}"
        chosen = [own] if len(names) == inner.data_size else names
        errors = [stored.shard(key, name, **shard) for name in chosen]
        error = torch.stack(errors).mean(0) if len(errors) > 1 else errors[0]
        start, stop = inner.server_range(parameter)
        state = inner.state[parameter]
        state[WORKER_ERROR] = error.view(parameter.shape).to(parameter.device)
        state[SERVER_ERROR] = stored.shard(key, SERVER_ERROR, **shard)[start:stop].to(parameter.device)
    inner.resume()


def shard_refs(optimizer: Any, parameters: dict[str, Parameter], data_rank: int) -> Iterator[ShardRef]:
    """Yields this rank's ranges of trained parameters; without ZeRO the first data rank that holds one has it."""
    parameters = {key: parameter for key, parameter in parameters.items() if parameter.requires_grad}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3_refs(optimizer, parameters)
        return
    assigned = getattr(inner_optimizer(optimizer), "assigned", {})
    for key, parameter in parameters.items():
        if parameter in assigned and assigned[parameter].across_data:
            full = assigned[parameter].full
            if full is not None:
                yield ShardRef(key, parameter, 0, full.numel(), full, 0, in_full=True)
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is not None:
                address, range_ = mapping.hp_fragment_address, mapping.lp_fragment_address
                owner = inner_optimizer(optimizer).param_groups[mapping.param_group_index]["params"][0]
                stop = range_.start + range_.numel
                yield ShardRef(key, parameter, range_.start, stop, owner, address.start, _base(parameter))
        elif data_rank // expert_rank_and_size(parameter)[1] == 0:
            yield ShardRef(key, parameter, 0, parameter.numel(), parameter, 0, _base(parameter))


def _base(parameter: Parameter) -> int:
    """Start of the parameter in the flattened tensor-parallel shard, which holds the experts of all ranks."""
    return expert_rank_and_size(parameter)[0] * parameter.numel()


def _stage3_refs(optimizer: Any, parameters: dict[str, Parameter]) -> Iterator[ShardRef]:
    """Yields the ranges at ZeRO 3, which partitions every parameter evenly, with padding at the end."""
    for key, parameter in parameters.items():
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = numel * optimizer._get_param_partition_rank(parameter)
        stop = min(start + numel, parameter.ds_numel)  # type: ignore[attr-defined]
        if start < stop:
            yield ShardRef(key, parameter, start, stop, optimizer.fp32_partitioned_groups_flat[group], offset)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Returns the torch optimizer inside DeepSpeed's."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
