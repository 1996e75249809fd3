"""Layout-independent initial values.

The full tensor of each parameter is drawn in fp32 on the CPU from a generator that is seeded by (seed, layer index,
parameter name), and each rank keeps its shard. So every tensor, pipeline, data and ZeRO layout starts from the same
bits, and a tied weight is the same on both pipeline stages that hold it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron.distributed.mesh import Axis
from megatron.distributed.param_attrs import mark_experts, mark_no_weight_decay, mark_sections, mark_sharded
from megatron.distributed.partial_grads import mark_partial_grad

InitFn = Callable[[Tensor, torch.Generator], None]
"""Initializes a full (unsharded) fp32 CPU tensor in place, drawing from the generator only."""
Rescale = Callable[[str, InitFn, bool], InitFn]
"""(key of a tensor, its InitFn, whether it is initialized as its transpose) -> the InitFn to use instead."""


def zeros(tensor: Tensor, generator: torch.Generator) -> None:
    """The InitFn of zeros."""
    tensor.zero_()


@dataclass(frozen=True)
class PaddedInit:
    """Initializes the first rows as if there were no others, and the others to 0: padding changes no initial value."""

    init_fn: InitFn
    """Initializes the first rows."""
    rows: int
    """Number of rows that are not padding."""

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        self.init_fn(tensor[: self.rows], generator)
        tensor[self.rows :].zero_()


@dataclass(frozen=True)
class ParamFactory:
    """Creates the parameters of one module."""

    seed: int
    """Seed of the run."""
    layer: int
    """Index of the layer in the model."""
    axis: Axis
    """Tensor-parallel ranks."""
    dtype: torch.dtype = torch.float32
    """Type of the parameters."""
    prefix: str = ""
    """Dotted name of the module inside its layer."""
    rescale: Rescale | None = None
    """Replaces initial values (muP); None keeps them."""

    def of(self, module: str) -> ParamFactory:
        """Returns the factory of a submodule."""
        return replace(self, prefix=f"{self.prefix}{module}.")

    def replicated(
        self, name: str, shape: tuple[int, ...], init_fn: InitFn, *, full_sequence: bool = False
    ) -> nn.Parameter:
        """Creates a parameter that every tensor-parallel rank holds in full. Vectors take no weight decay.

        Args:
            name: name inside the module.
            shape: shape of the parameter.
            init_fn: initial values.
            full_sequence: true if every rank applies it to the full sequence; otherwise, with sequence parallelism,
                each rank applies it to its shard of the sequence.
        """
        parameter = nn.Parameter(self._draw(name, shape, self._rescaled(name, init_fn)).to(self.dtype))
        if len(shape) == 1:
            mark_no_weight_decay(parameter)
        if self.axis.sequence_parallel and not full_sequence:
            mark_partial_grad(parameter, self.axis)
        return parameter

    def expert_stack(
        self,
        name: str,
        shape: tuple[int, int],
        init_fn: InitFn,
        *,
        count: int,
        over: Axis,
        transposed: bool = False,
        sharded: bool = True,
    ) -> nn.Parameter:
        """Creates this rank's shards of `count` expert matrices, stacked: [e w/t, h].

        Every expert is drawn from a generator of its own. Raises ValueError if a shard would be uneven.

        Args:
            name: name inside the module.
            shape: [w, h] of one expert, whose rows are sharded over tensor-parallel ranks.
            init_fn: initial values.
            count: number of experts.
            over: ranks over which the experts are distributed, e experts on each.
            transposed: true if the matrix of the layer is [h, w], and is initialized as such.
            sharded: false if each tensor-parallel rank has all rows, [e w, h], and computes a term of their gradient.
        """
        if count % over.size:
            raise ValueError(f"{count} experts do not divide by {over.size} expert-parallel ranks")
        init_fn = self._rescaled(name, init_fn, transposed=transposed)
        parts = []
        for expert in range(over.rank * (count // over.size), (over.rank + 1) * (count // over.size)):
            full = self._draw(f"{name}.{expert}", shape[::-1] if transposed else shape, init_fn)
            full = full.t() if transposed else full
            parts.append((_shard_of(full, 0, self.axis) if sharded else full).to(self.dtype))
        parameter = nn.Parameter(torch.cat(parts))
        sections = (shape[0],) * count
        if sharded:
            mark_sharded(parameter, 0, sections)
        else:
            mark_sections(parameter, sections)
            if self.axis.size > 1:
                mark_partial_grad(parameter, self.axis)
        mark_experts(parameter, over)
        return parameter

    def expert_biases(self, name: str, features: int, *, count: int, over: Axis, sharded: bool) -> nn.Parameter:
        """Creates this rank's biases of `count` experts, one after the other, of zeros: [e f/t] or [e f].

        Raises ValueError if a shard would be uneven.

        Args:
            name: name inside the module.
            features: outputs of one expert.
            count: number of experts.
            over: ranks over which the experts are distributed, e experts on each.
            sharded: true if each tensor-parallel rank has its outputs; otherwise each has all of them, and adds a part
                of the bias to its term of a sum.
        """
        if count % over.size or (sharded and features % self.axis.size):
            raise ValueError(f"{count} experts of {features} features do not divide by the ranks")
        own = features // self.axis.size if sharded else features
        parameter = nn.Parameter(torch.zeros(count // over.size * own, dtype=self.dtype))
        mark_no_weight_decay(parameter)
        if sharded:
            mark_sharded(parameter, 0, (features,) * count)
        elif self.axis.size > 1:
            mark_partial_grad(parameter, self.axis)
        mark_experts(parameter, over)
        return parameter

    def sharded(
        self, name: str, shape: tuple[int, ...], init_fn: InitFn, *, dim: int, sections: tuple[int, ...] = ()
    ) -> nn.Parameter:
        """Creates this rank's shard of a parameter of global ``shape``.

        Raises ValueError if a section does not divide by the tensor-parallel degree.

        Args:
            name: name inside the module.
            shape: global shape.
            init_fn: initial values.
            dim: dimension along which the parameter is sharded.
            sections: sizes of the sections along `dim` that are sharded separately; one section unless set.
        """
        full = self._draw(name, shape, self._rescaled(name, init_fn))
        shards = [_shard_of(part, dim, self.axis) for part in full.split(list(sections or (shape[dim],)), dim=dim)]
        local = shards[0] if len(shards) == 1 else torch.cat(shards, dim=dim)
        # A copy, so that the memory of the full tensor is released.
        parameter = nn.Parameter(local.to(self.dtype, copy=True, memory_format=torch.contiguous_format))
        mark_sharded(parameter, dim, sections)
        if len(shape) == 1:
            mark_no_weight_decay(parameter)
        return parameter

    def _rescaled(self, name: str, init_fn: InitFn, *, transposed: bool = False) -> InitFn:
        if self.rescale is None or init_fn is zeros:
            return init_fn
        return self.rescale(f"{self.layer}.{self.prefix}{name}", init_fn, transposed)

    def _draw(self, name: str, shape: tuple[int, ...], init_fn: InitFn) -> Tensor:
        """Returns the full tensor, drawn on the CPU; under `torch.device("meta")` its shape alone."""
        if torch.get_default_device().type == "meta":
            return torch.empty(shape, dtype=torch.float32)
        generator = torch.Generator().manual_seed(parameter_seed(self.seed, self.layer, self.prefix + name))
        full = torch.empty(shape, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            init_fn(full, generator)
        return full


def parameter_seed(seed: int, layer: int, name: str) -> int:
    """Returns a 63-bit seed for a parameter of a run; stable across processes and versions."""
    digest = hashlib.sha256(f"{seed}/{layer}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _shard_of(section: Tensor, dim: int, axis: Axis) -> Tensor:
    rows = section.shape[dim]
    if rows % axis.size:
        raise ValueError(f"{rows} rows do not divide by {axis.size} tensor-parallel ranks")
    return section.narrow(dim, axis.rank * (rows // axis.size), rows // axis.size)
