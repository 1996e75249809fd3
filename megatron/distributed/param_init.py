"""Initial values that do not depend on the layout.

The full tensor of each parameter is drawn in fp32 on the CPU from a generator that is seeded by (seed, layer index,
parameter name), and each rank keeps its slice. So every tensor, pipeline, data and ZeRO layout starts from the same
bits, and a tied weight is the same on both pipeline stages that hold it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron.distributed.mesh import Axis
from megatron.distributed.param_attrs import mark_experts, mark_no_weight_decay, mark_partial_grad, mark_sharded

Fill = Callable[[Tensor, torch.Generator], None]
"""Fills a full (unsharded) fp32 CPU tensor in place, drawing from the generator only."""
Rescale = Callable[[str, Fill, bool], Fill]
"""(key of a tensor, its Fill, whether it is filled as its transpose) -> the Fill to use instead."""


def zeros(tensor: Tensor, generator: torch.Generator) -> None:
    """The Fill that draws nothing."""
    tensor.zero_()


@dataclass(frozen=True)
class PaddedInit:
    """Fills the first rows only, as if there were no others, which are 0: padding then changes no initial value."""

    fill: Fill
    rows: int

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        self.fill(tensor[: self.rows], generator)
        tensor[self.rows :].zero_()


@dataclass(frozen=True)
class ParamFactory:
    """Makes the parameters of one module.

    seed: of the run. layer: index in the layer plan. prefix: dotted name of the module inside its layer. rescale: how
    initial values differ from what a Fill draws; not at all unless given.
    """

    seed: int
    layer: int
    axis: Axis
    dtype: torch.dtype = torch.float32
    prefix: str = ""
    rescale: Rescale | None = None

    def of(self, module: str) -> ParamFactory:
        """The source of a submodule."""
        return replace(self, prefix=f"{self.prefix}{module}.")

    def replica(self, name: str, shape: tuple[int, ...], fill: Fill, *, whole_sequence: bool = False) -> nn.Parameter:
        """A parameter that every tensor-parallel rank holds whole. Vectors (biases) take no weight decay.

        It acts between tensor-parallel regions; with sequence parallelism that is on a part of the sequence, unless
        whole_sequence says that every rank sees all of it.
        """
        parameter = nn.Parameter(self._draw(name, shape, self._rescaled(name, fill)).to(self.dtype))
        if len(shape) == 1:
            mark_no_weight_decay(parameter)
        if self.axis.sequence and not whole_sequence:
            mark_partial_grad(parameter, self.axis)
        return parameter

    def experts(
        self, name: str, shape: tuple[int, int], fill: Fill, *, count: int, over: Axis, transposed: bool = False
    ) -> nn.Parameter:
        """This rank's part of the matrices of `count` experts, one on top of the other: [e w/t, h].

        shape: [w, h] of one expert, whose rows are cut by tensor parallelism. over: the ranks that share the experts,
        each holding e of them whole. transposed: the matrix of the layer is [h, w], and is filled as such. Every
        expert is drawn from a generator of its own. ValueError where a cut is uneven.
        """
        if count % over.size:
            raise ValueError(f"{count} experts do not divide by {over.size} expert-parallel ranks")
        fill = self._rescaled(name, fill, transposed=transposed)
        parts = []
        for expert in range(over.rank * (count // over.size), (over.rank + 1) * (count // over.size)):
            full = self._draw(f"{name}.{expert}", shape[::-1] if transposed else shape, fill)
            parts.append(_piece(full.t() if transposed else full, 0, self.axis).to(self.dtype))
        parameter = nn.Parameter(torch.cat(parts))
        mark_sharded(parameter, 0, (shape[0],) * count)
        mark_experts(parameter, over)
        return parameter

    def shard(
        self, name: str, shape: tuple[int, ...], fill: Fill, *, dim: int, sections: tuple[int, ...] = ()
    ) -> nn.Parameter:
        """This rank's slice of a parameter of global ``shape``, cut along ``dim``, section by section.

        ValueError where a section does not divide by the tensor-parallel degree.
        """
        full = self._draw(name, shape, self._rescaled(name, fill))
        pieces = [_piece(part, dim, self.axis) for part in full.split(list(sections or (shape[dim],)), dim=dim)]
        local = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)
        # A clone, so that the full tensor's memory is given back.
        parameter = nn.Parameter(local.to(self.dtype, copy=True, memory_format=torch.contiguous_format))
        mark_sharded(parameter, dim, sections)
        if len(shape) == 1:
            mark_no_weight_decay(parameter)
        return parameter

    def _rescaled(self, name: str, fill: Fill, *, transposed: bool = False) -> Fill:
        if self.rescale is None or fill is zeros:
            return fill
        return self.rescale(f"{self.layer}.{self.prefix}{name}", fill, transposed)

    def _draw(self, name: str, shape: tuple[int, ...], fill: Fill) -> Tensor:
        """The full tensor, always drawn on the CPU; under `torch.device("meta")` its shape alone."""
        if torch.get_default_device().type == "meta":
            return torch.empty(shape, dtype=torch.float32)
        generator = torch.Generator().manual_seed(parameter_seed(self.seed, self.layer, self.prefix + name))
        full = torch.empty(shape, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            fill(full, generator)
        return full


def parameter_seed(seed: int, layer: int, name: str) -> int:
    """A 63-bit seed from the run's seed and the parameter's place; stable across processes and versions."""
    digest = hashlib.sha256(f"{seed}/{layer}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _piece(section: Tensor, dim: int, axis: Axis) -> Tensor:
    rows = section.shape[dim]
    if rows % axis.size:
        raise ValueError(f"{rows} rows do not divide by {axis.size} tensor-parallel ranks")
    return section.narrow(dim, axis.rank * (rows // axis.size), rows // axis.size)
