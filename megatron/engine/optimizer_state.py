"""Optimizer state out of and into DeepSpeed's optimizers, by parameter and range.

Under ZeRO an optimizer sees flat tensors that are pieces of many parameters. DeepSpeed records where each parameter's
piece lies: `_hp_mapping` at ZeRO 1 and 2 and in its bf16 optimizer, `grad_position` at ZeRO 3. Without ZeRO the
optimizer sees the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.nn import Parameter

from megatron.checkpoint.format.optimizer_shards import MASTER, OptimizerShard, OptimizerState
from megatron.distributed.param_attrs import expert_rank_and_size
from megatron.optim.builder_args import STEP
from megatron.optim.onebit import SERVER_ERROR, WORKER_ERROR, OnebitAdam
from megatron.optim.state_io import Kept, kept, restore
from megatron.optim.unsharded import AssignedTensor

_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a moving loss scale of DeepSpeed keeps."""
RANKED = (WORKER_ERROR, SERVER_ERROR)
"""State that differs between data-parallel ranks."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank's optimizer updates.

    start, stop: range of the flattened parameter. base: where the parameter begins in the flattened tensor-parallel
    shard, of which it may be the experts of this rank. owner: the tensor that the optimizer steps. offset: where the
    range begins in the flattened owner.
    """

    key: str
    parameter: Parameter
    start: int
    stop: int
    owner: Tensor
    offset: int
    base: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor of the owner's shape, flat; shares its memory."""
        return tensor.view(-1).narrow(0, self.offset, self.stop - self.start)

    @property
    def has_master(self) -> bool:
        """Whether the optimizer updates a copy in a higher precision than the model computes in."""
        return self.owner.dtype != self.parameter.dtype


def read(optimizer: Any, parameters: dict[str, Parameter], *, data_rank: int) -> list[OptimizerShard]:
    """The slices this rank is responsible for. Views, not copies.

    optimizer: DeepSpeed's or torch's. parameters: key -> parameter of this rank's model.
    """
    inner = inner_optimizer(optimizer)
    slices: list[OptimizerShard] = []
    found: dict[Tensor, Kept] = {}
    for piece in pieces(optimizer, parameters, data_rank):
        dealt = getattr(inner, "dealt", {}).get(piece.parameter)
        if dealt is not None:
            slices += _dealt_slices(piece.key, dealt, inner)
            continue
        if piece.owner not in found:
            found[piece.owner] = kept(inner, piece.owner, apart=RANKED)
        one = found[piece.owner]
        tensors = {name: piece.of(value) for name, value in one.elementwise.items()}
        if piece.has_master:
            tensors[MASTER] = piece.of(piece.owner.detach())
        start, stop = piece.base + piece.start, piece.base + piece.stop
        slices.append(OptimizerShard(piece.key, start, stop, one.step, tensors, one.whole))
    if isinstance(inner, OnebitAdam):
        slices += _errors(inner, parameters)
    return slices


@torch.no_grad()
def write(
    optimizer: Any, parameters: dict[str, Parameter], stored: OptimizerState, *, model_rank: int, model_size: int
) -> None:
    """Fills the optimizer with stored state, cut for this rank's layout."""
    inner = inner_optimizer(optimizer)
    shard = {"model_rank": model_rank, "model_size": model_size}
    filled: dict[Tensor, Kept] = {}
    for piece in pieces(optimizer, parameters, data_rank=0):
        dealt = getattr(inner, "dealt", {}).get(piece.parameter)
        if dealt is not None:
            _write_dealt(piece.key, dealt, inner, stored)
            continue
        if piece.owner not in filled:
            filled[piece.owner] = Kept(stored.step(piece.key), {}, stored.tensor_level_state(piece.key))
        for name in _plain_names(stored, piece.key):
            values = stored.shard(piece.key, name, **shard)[piece.base + piece.start : piece.base + piece.stop]
            if name == MASTER:
                if piece.has_master:
                    piece.of(piece.owner.detach()).copy_(values)
                continue
            elementwise = filled[piece.owner].elementwise
            if name not in elementwise:
                elementwise[name] = torch.zeros_like(piece.owner)
            piece.of(elementwise[name]).copy_(values)
    for owner, found in filled.items():
        if found.elementwise or found.whole:  # one that has made no update keeps nothing, and starts from that
            restore(inner, owner, found)
    if isinstance(inner, OnebitAdam):
        _write_errors(inner, parameters, stored, shard)


def read_scaling(optimizer: Any) -> dict[str, float]:
    """Where a moving loss scale stands; empty where there is none."""
    scaler = _moving_scaler(optimizer)
    return {name: getattr(scaler, name) for name in _SCALING if hasattr(scaler, name)}


def write_scaling(optimizer: Any, stored: Mapping[str, float]) -> None:
    """Puts a moving loss scale where it stood; a run without one takes nothing over."""
    scaler = _moving_scaler(optimizer)
    for name, value in stored.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _moving_scaler(optimizer: Any) -> Any:
    """What of DeepSpeed's optimizer moves the loss scale of fp16, or None."""
    for name, moves in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(optimizer, name, None)
        if getattr(scaler, moves, False):
            return scaler
    return None


def _dealt_slices(key: str, dealt: AssignedTensor, inner: torch.optim.Optimizer) -> Iterator[OptimizerShard]:
    """State of a tensor that its owner updates whole, as the slices of every tensor-parallel rank."""
    if dealt.whole is None:
        return
    one = kept(inner, dealt.whole)
    size = dealt.whole.numel() // dealt.shard.numel()
    for rank in range(size):
        tensors = {name: dealt.cut(value, rank, size).flatten() for name, value in one.elementwise.items()}
        whole = one.whole if rank == 0 else {}
        yield OptimizerShard(key, 0, dealt.shard.numel(), one.step, tensors, whole, model_rank=rank)


def _write_dealt(key: str, dealt: AssignedTensor, inner: torch.optim.Optimizer, stored: OptimizerState) -> None:
    if dealt.whole is None:
        return
    whole = dealt.whole
    tensors = {
        name: stored.shard(key, name, model_rank=0, model_size=1).view(whole.shape).to(whole.device)
        for name in _plain_names(stored, key)
        if name != MASTER
    }
    found = Kept(stored.step(key), tensors, stored.tensor_level_state(key))
    if found.elementwise or found.whole:
        restore(inner, whole, found)


def _plain_names(stored: OptimizerState, key: str) -> list[str]:
    """What is stored of a parameter, without what belongs to single data-parallel ranks."""
    return [name for name in stored.names(key) if not name.startswith(RANKED)]


def _errors(inner: OnebitAdam, parameters: dict[str, Parameter]) -> Iterator[OptimizerShard]:
    """What compression left out: each rank's own error for whole shards, and its part of the servers' error."""
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
    """Gives the errors back.

    Where the number of data-parallel ranks changed each takes the mean of the workers' errors, which leaves the error
    of the mean momentum as it was.
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


def pieces(optimizer: Any, parameters: dict[str, Parameter], data_rank: int) -> Iterator[Piece]:
    """This rank's pieces of what is trained; what no ZeRO cuts belongs to the first data rank that holds it."""
    parameters = {key: parameter for key, parameter in parameters.items() if parameter.requires_grad}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3_pieces(optimizer, parameters)
        return
    for key, parameter in parameters.items():
        if hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is not None:
                address, range_ = mapping.hp_fragment_address, mapping.lp_fragment_address
                owner = inner_optimizer(optimizer).param_groups[mapping.param_group_index]["params"][0]
                stop = range_.start + range_.numel
                yield Piece(key, parameter, range_.start, stop, owner, address.start, _base(parameter))
        elif data_rank // expert_rank_and_size(parameter)[1] == 0:
            yield Piece(key, parameter, 0, parameter.numel(), parameter, 0, _base(parameter))


def _base(parameter: Parameter) -> int:
    """Where the parameter begins in the flattened tensor-parallel shard, which holds the experts of all ranks."""
    return expert_rank_and_size(parameter)[0] * parameter.numel()


def _stage3_pieces(optimizer: Any, parameters: dict[str, Parameter]) -> Iterator[Piece]:
    """ZeRO 3 cuts every parameter into equal parts, the last one padded."""
    for key, parameter in parameters.items():
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = numel * optimizer._get_param_partition_rank(parameter)
        stop = min(start + numel, parameter.ds_numel)  # type: ignore[attr-defined]
        if start < stop:
            yield Piece(key, parameter, start, stop, optimizer.fp32_partitioned_groups_flat[group], offset)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that does the updates."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
