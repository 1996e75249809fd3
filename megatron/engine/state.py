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

from megatron.checkpoint.slices import MASTER, OptimizerState, StateSlice
from megatron.parallel.marks import expert_share

STEP = "step"
_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a moving loss scale of DeepSpeed keeps."""


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


def read(optimizer: Any, parameters: dict[str, Parameter], *, data_rank: int) -> list[StateSlice]:
    """The slices this rank is responsible for. Views, not copies.

    optimizer: DeepSpeed's or torch's. parameters: key -> parameter of this rank's model.
    """
    inner = _inner(optimizer)
    slices = []
    for piece in _pieces(optimizer, parameters, data_rank):
        state = inner.state.get(piece.owner, {})
        tensors = {name: piece.of(value) for name, value in state.items() if _is_elementwise(value, piece.owner)}
        if piece.has_master:
            tensors[MASTER] = piece.of(piece.owner.detach())
        step = int(state[STEP]) if STEP in state else 0
        start, stop = piece.base + piece.start, piece.base + piece.stop
        slices.append(StateSlice(piece.key, start, stop, step, tensors))
    return slices


@torch.no_grad()
def write(
    optimizer: Any, parameters: dict[str, Parameter], stored: OptimizerState, *, model_rank: int, model_size: int
) -> None:
    """Fills the optimizer with stored state, cut for this rank's layout."""
    inner = _inner(optimizer)
    shard = {"model_rank": model_rank, "model_size": model_size}
    for piece in _pieces(optimizer, parameters, data_rank=0):
        state = inner.state[piece.owner]
        for name in stored.names(piece.key):
            values = stored.shard(piece.key, name, **shard)[piece.base + piece.start : piece.base + piece.stop]
            if name == MASTER:
                if piece.has_master:
                    piece.of(piece.owner.detach()).copy_(values)
                continue
            if name not in state:
                state[name] = torch.zeros_like(piece.owner)
            piece.of(state[name]).copy_(values)
        if state:  # an optimizer that has made no update keeps nothing, and starts from that
            state[STEP] = torch.tensor(float(stored.step(piece.key)), device=piece.owner.device)


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


def _pieces(optimizer: Any, parameters: dict[str, Parameter], data_rank: int) -> Iterator[Piece]:
    """This rank's pieces. A parameter that no ZeRO cuts belongs to the first data rank that holds it."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3_pieces(optimizer, parameters)
        return
    for key, parameter in parameters.items():
        if hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is not None:
                address, range_ = mapping.hp_fragment_address, mapping.lp_fragment_address
                owner = _inner(optimizer).param_groups[mapping.param_group_index]["params"][0]
                stop = range_.start + range_.numel
                yield Piece(key, parameter, range_.start, stop, owner, address.start, _base(parameter))
        elif data_rank // expert_share(parameter)[1] == 0:
            yield Piece(key, parameter, 0, parameter.numel(), parameter, 0, _base(parameter))


def _base(parameter: Parameter) -> int:
    """Where the parameter begins in the flattened tensor-parallel shard, which holds the experts of all ranks."""
    return expert_share(parameter)[0] * parameter.numel()


def _stage3_pieces(optimizer: Any, parameters: dict[str, Parameter]) -> Iterator[Piece]:
    """ZeRO 3 cuts every parameter into equal parts, the last one padded."""
    for key, parameter in parameters.items():
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = numel * optimizer._get_param_partition_rank(parameter)
        stop = min(start + numel, parameter.ds_numel)  # type: ignore[attr-defined]
        if start < stop:
            yield Piece(key, parameter, start, stop, optimizer.fp32_partitioned_groups_flat[group], offset)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that does the updates."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _is_elementwise(value: Any, owner: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == owner.shape and value.dim() > 0
