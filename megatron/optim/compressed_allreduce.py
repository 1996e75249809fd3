"""Mean over ranks with one bit an element and error feedback (arXiv:2102.02888, figure 3).

Each rank is the server of one chunk of every tensor. It receives the signs of all ranks for its chunk, averages the
values they represent, compresses the average again and sends the signs to all. In both directions the compression error
is stored and added the next time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.param_attrs import is_sharded, shard_dim

BITS = 8


@dataclass
class CommBytes:
    """Communication volume of one rank."""

    sent: float = 0.0
    """Bytes sent."""
    uncompressed: float = 0.0
    """Bytes that a ring all-reduce of the same tensors in fp32 would have sent."""

    def measure(self) -> dict[str, float]:
        """Returns both as metrics, once anything was sent."""
        if not self.uncompressed:
            return {}
        return {"runtime/momentum_bytes": self.sent, "runtime/momentum_bytes_in_fp32": self.uncompressed}


@dataclass(frozen=True)
class _BufferSlot:
    """Location of a tensor's magnitudes and signs in the buffers."""

    parameter: Parameter
    rows: int
    """Rows of the shard."""
    columns: int
    """Columns of the shard."""
    first_row: int
    chunk: int
    """Elements of a chunk."""
    first_byte: int
    active: Tensor
    """Elements that take part; flat, padded to chunk x ranks."""


class CompressedAllReduce:
    """Averages tensors over `topology.dp_cp`."""

    def __init__(self, active: Mapping[Parameter, Tensor], topology: Topology, comm_bytes: CommBytes) -> None:
        """Computes the layout of the buffers.

        Args:
            active: parameter -> mask of the elements that take part.
            topology: layout of the ranks.
            comm_bytes: counts what is sent.
        """
        self._axis, self._model, self._comm_bytes = topology.dp_cp, topology.model, comm_bytes
        self._slots: list[_BufferSlot] = []
        row = byte = 0
        for parameter, mask in active.items():
            rows, columns = rows_of(parameter)
            chunk = _chunk(parameter.numel(), self._axis.size)
            padded = torch.zeros(chunk * self._axis.size, dtype=torch.bool, device=mask.device)
            padded[: mask.numel()] = mask.flatten()
            self._slots.append(_BufferSlot(parameter, rows, columns, row, chunk, byte, padded))
            # Tensor parallelism along rows leaves each row on one rank; along columns all ranks share each row.
            row += rows
            byte += chunk // BITS
        self._rows, self._bytes = row, byte
        device = self._slots[0].active.device
        self._sharded_rows = torch.zeros(row, dtype=torch.bool, device=device)
        for slot in self._slots:
            vector = slot.parameter.dim() < 2
            is_sharded_row = shard_dim(slot.parameter) == 1 or (vector and is_sharded(slot.parameter))
            self._sharded_rows[slot.first_row : slot.first_row + slot.rows] = is_sharded_row
        counts = torch.zeros(row, device=device)
        for slot in self._slots:
            flat = slot.active[: slot.rows * slot.columns].float()
            counts[slot.first_row : slot.first_row + slot.rows] = flat.view(slot.rows, slot.columns).sum(1)
        self._counts = self._sum_sharded_rows(counts).clamp_(min=1)

    @staticmethod
    def chunk(parameter: Parameter, axis: Axis) -> tuple[int, int]:
        """Returns the range of a flattened tensor that this rank serves; empty if there are no elements left."""
        size = _chunk(parameter.numel(), axis.size)
        start = min(axis.rank * size, parameter.numel())
        return start, min(start + size, parameter.numel())

    def average(self, values: Mapping[Parameter, Tensor], errors: Mapping[Parameter, tuple[Tensor, Tensor]]) -> None:
        """Replaces each tensor by its mean over ranks; updates its (worker error, server error) in place."""
        wire, magnitudes = self._as_worker(values, errors)
        received, all_magnitudes = self._to_servers(wire, magnitudes)
        server_signs, server_magnitudes = self._as_server(received, all_magnitudes, errors)
        gathered_signs = self._from_servers(server_signs)
        for slot in self._slots:
            bits = gathered_signs[:, slot.first_byte : slot.first_byte + slot.chunk // BITS]
            signs = _unpack(bits).flatten()  # of the full tensor, in order of chunks
            mean = torch.where(slot.active, signs * self._expand(server_magnitudes, slot, 0, signs.numel()), 0.0)
            target = values[slot.parameter]
            target.copy_(mean[: target.numel()].view_as(target))
        self._comm_bytes.uncompressed += 4.0 * sum(p.parameter.numel() for p in self._slots) * self._ring(2)

    def _as_worker(
        self, values: Mapping[Parameter, Tensor], errors: Mapping[Parameter, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        compensated = {}
        sums = torch.zeros_like(self._counts)
        for slot in self._slots:
            worker_error = errors[slot.parameter][0]
            flat = _padded(values[slot.parameter] + worker_error, slot.active.numel())
            compensated[slot.parameter] = flat = torch.where(slot.active, flat, 0.0)
            matrix = flat[: slot.rows * slot.columns].view(slot.rows, slot.columns)
            sums[slot.first_row : slot.first_row + slot.rows] = matrix.abs().sum(1)
        magnitudes = self._sum_sharded_rows(sums) / self._counts
        wire = torch.empty(self._axis.size, self._bytes, dtype=torch.uint8, device=sums.device)
        for slot in self._slots:
            flat, worker_error = compensated[slot.parameter], errors[slot.parameter][0]
            sent = torch.where(slot.active, _signs(flat) * self._expand(magnitudes, slot, 0, flat.numel()), 0.0)
            worker_error.copy_((flat - sent)[: worker_error.numel()].view_as(worker_error))
            packed = _pack(flat.view(self._axis.size, slot.chunk))
            wire[:, slot.first_byte : slot.first_byte + slot.chunk // BITS] = packed
        return wire, magnitudes

    def _as_server(
        self, received: Tensor, magnitudes: Tensor, errors: Mapping[Parameter, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Returns (packed signs of this rank's chunks, magnitudes of all rows)."""
        averages = {}
        sums = torch.zeros_like(self._counts)
        for slot in self._slots:
            begin = self._axis.rank * slot.chunk
            active = slot.active[begin : begin + slot.chunk]
            signs = _unpack(received[:, slot.first_byte : slot.first_byte + slot.chunk // BITS])  # [ranks, chunk]
            mean = torch.zeros(slot.chunk, device=signs.device)
            for rank in range(self._axis.size):
                mean += signs[rank] * self._expand(magnitudes[rank], slot, begin, slot.chunk)
            server_error = errors[slot.parameter][1]
            mean = torch.where(active, mean / self._axis.size + _padded(server_error, slot.chunk), 0.0)
            averages[slot.parameter] = mean
            sums.index_add_(0, self._row_of(slot, begin, slot.chunk), mean.abs())
        self._reduce(sums, self._axis)
        server_magnitudes = self._sum_sharded_rows(sums) / self._counts
        server_signs = torch.empty(self._bytes, dtype=torch.uint8, device=sums.device)
        for slot in self._slots:
            begin = self._axis.rank * slot.chunk
            active = slot.active[begin : begin + slot.chunk]
            mean, server_error = averages[slot.parameter], errors[slot.parameter][1]
            sent = torch.where(active, _signs(mean) * self._expand(server_magnitudes, slot, begin, slot.chunk), 0.0)
            server_error.copy_((mean - sent)[: server_error.numel()])
            server_signs[slot.first_byte : slot.first_byte + slot.chunk // BITS] = _pack(mean.view(1, -1))[0]
        return server_signs, server_magnitudes

    def _to_servers(self, wire: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        axis = self._axis
        if axis.size == 1:
            return wire, magnitudes.unsqueeze(0)
        received = torch.empty_like(wire)
        dist.all_to_all_single(received, wire, group=axis.group)
        gathered = [torch.empty_like(magnitudes) for _ in range(axis.size)]
        dist.all_gather(gathered, magnitudes, group=axis.group)
        self._comm_bytes.sent += wire.nbytes * self._ring(1) + magnitudes.nbytes * (axis.size - 1)
        return received, torch.stack(gathered)

    def _from_servers(self, server_signs: Tensor) -> Tensor:
        axis = self._axis
        if axis.size == 1:
            return server_signs.unsqueeze(0)
        gathered = [torch.empty_like(server_signs) for _ in range(axis.size)]
        dist.all_gather(gathered, server_signs, group=axis.group)
        self._comm_bytes.sent += server_signs.nbytes * (axis.size - 1)
        return torch.stack(gathered)

    def _sum_sharded_rows(self, sums: Tensor) -> Tensor:
        """Sums the rows that are sharded along columns over tensor-parallel ranks; leaves the others."""
        if self._model.size == 1 or not bool(self._sharded_rows.any()):
            return sums
        parts = sums[self._sharded_rows]
        dist.all_reduce(parts, group=self._model.group)
        total = sums.clone()
        total[self._sharded_rows] = parts
        return total

    def _reduce(self, sums: Tensor, axis: Axis) -> None:
        if axis.size > 1:
            dist.all_reduce(sums, group=axis.group)
            self._comm_bytes.sent += sums.nbytes * self._ring(2)

    def _ring(self, passes: int) -> float:
        """Returns the fraction of a buffer that a rank sends in that many passes around a ring."""
        return passes * (self._axis.size - 1) / self._axis.size

    def _row_of(self, slot: _BufferSlot, begin: int, count: int) -> Tensor:
        """Returns the buffer row of each of `count` elements from `begin` on; padding belongs to the last row."""
        rows = torch.arange(begin, begin + count, device=slot.active.device) // slot.columns
        return rows.clamp_(max=slot.rows - 1) + slot.first_row

    def _expand(self, magnitudes: Tensor, slot: _BufferSlot, begin: int, count: int) -> Tensor:
        return magnitudes[self._row_of(slot, begin, count)]


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Returns rows and columns of a tensor for compression: a vector is one row."""
    if tensor.dim() < 2:
        return 1, tensor.numel()
    return tensor.shape[0], tensor.numel() // tensor.shape[0]


def _chunk(count: int, ranks: int) -> int:
    """Returns the elements of a chunk: full bytes of signs, as many for each rank."""
    return -(-count // (BITS * ranks)) * BITS


def _padded(values: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(values.flatten(), (0, count - values.numel()))


def _signs(values: Tensor) -> Tensor:
    """Returns 1 or -1; zero counts as positive."""
    return torch.where(values >= 0, 1.0, -1.0)


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(BITS)], dtype=torch.uint8, device=device)


def _pack(values: Tensor) -> Tensor:
    """Packs signs [ranks, elements] into bytes [ranks, elements / 8]."""
    bits = (values >= 0).view(values.shape[0], -1, BITS).to(torch.uint8)
    return (bits * _powers(values.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor) -> Tensor:
    """Unpacks bytes [ranks, elements / 8] into 1 and -1, [ranks, elements]."""
    bits = packed.unsqueeze(-1).bitwise_and(_powers(packed.device)).ne(0)
    return torch.where(bits, 1.0, -1.0).flatten(1)
