"""The mean of a tensor over ranks, exchanged as one bit an element with error feedback (arXiv:2102.02888, figure 3).

Each rank serves one chunk of every tensor. It receives the signs of all ranks for its chunk, averages what they stand
for, compresses the average again and hands the signs to everyone. Both times what the compression leaves out is kept
and added the next time.
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
    """What one rank sends [bytes]: sent, and what a ring all-reduce of the same tensors in fp32 would have sent."""

    sent: float = 0.0
    uncompressed: float = 0.0

    def measure(self) -> dict[str, float]:
        """Both as metrics, once anything was sent."""
        if not self.uncompressed:
            return {}
        return {"runtime/momentum_bytes": self.sent, "runtime/momentum_bytes_in_fp32": self.uncompressed}


@dataclass(frozen=True)
class _Place:
    """Where a tensor's magnitudes and signs are in the buffers. rows, columns: of the shard; chunk [elements]."""

    parameter: Parameter
    rows: int
    columns: int
    first_row: int
    chunk: int
    first_byte: int
    live: Tensor  # flat, padded to chunk x ranks


class Exchange:
    """Averages tensors over `topology.dp_cp`. live: parameter -> the elements that take part."""

    def __init__(self, live: Mapping[Parameter, Tensor], topology: Topology, traffic: CommBytes) -> None:
        self._axis, self._model, self._traffic = topology.dp_cp, topology.model, traffic
        self._places: list[_Place] = []
        row = byte = 0
        for parameter, mask in live.items():
            rows, columns = rows_of(parameter)
            chunk = _chunk(parameter.numel(), self._axis.size)
            padded = torch.zeros(chunk * self._axis.size, dtype=torch.bool, device=mask.device)
            padded[: mask.numel()] = mask.flatten()
            self._places.append(_Place(parameter, rows, columns, row, chunk, byte, padded))
            # Rows that tensor parallelism cuts are on one rank; those that it cuts through have a part on each.
            row += rows
            byte += chunk // BITS
        self._rows, self._bytes = row, byte
        device = self._places[0].live.device
        self._through = torch.zeros(row, dtype=torch.bool, device=device)
        for place in self._places:
            vector = place.parameter.dim() < 2
            cut_through = shard_dim(place.parameter) == 1 or (vector and is_sharded(place.parameter))
            self._through[place.first_row : place.first_row + place.rows] = cut_through
        counts = torch.zeros(row, device=device)
        for place in self._places:
            flat = place.live[: place.rows * place.columns].float()
            counts[place.first_row : place.first_row + place.rows] = flat.view(place.rows, place.columns).sum(1)
        self._counts = self._over_model(counts).clamp_(min=1)

    @staticmethod
    def chunk(parameter: Parameter, axis: Axis) -> tuple[int, int]:
        """The range of a flattened tensor that this rank serves; empty where it has no elements left."""
        size = _chunk(parameter.numel(), axis.size)
        start = min(axis.rank * size, parameter.numel())
        return start, min(start + size, parameter.numel())

    def average(self, values: Mapping[Parameter, Tensor], errors: Mapping[Parameter, tuple[Tensor, Tensor]]) -> None:
        """Replaces each tensor by the mean over ranks; updates (worker error, server error) of each in place."""
        wire, magnitudes = self._as_worker(values, errors)
        received, all_magnitudes = self._to_servers(wire, magnitudes)
        served, serving = self._as_server(received, all_magnitudes, errors)
        everyone = self._from_servers(served)
        for place in self._places:
            bits = everyone[:, place.first_byte : place.first_byte + place.chunk // BITS]
            signs = _unpack(bits).flatten()  # of the whole tensor, chunk after chunk
            mean = torch.where(place.live, signs * self._spread(serving, place, 0, signs.numel()), 0.0)
            target = values[place.parameter]
            target.copy_(mean[: target.numel()].view_as(target))
        self._traffic.uncompressed += 4.0 * sum(p.parameter.numel() for p in self._places) * self._ring(2)

    def _as_worker(
        self, values: Mapping[Parameter, Tensor], errors: Mapping[Parameter, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        wanted = {}
        sums = torch.zeros_like(self._counts)
        for place in self._places:
            worker_error = errors[place.parameter][0]
            flat = _padded(values[place.parameter] + worker_error, place.live.numel())
            wanted[place.parameter] = flat = torch.where(place.live, flat, 0.0)
            matrix = flat[: place.rows * place.columns].view(place.rows, place.columns)
            sums[place.first_row : place.first_row + place.rows] = matrix.abs().sum(1)
        magnitudes = self._over_model(sums) / self._counts
        wire = torch.empty(self._axis.size, self._bytes, dtype=torch.uint8, device=sums.device)
        for place in self._places:
            flat, worker_error = wanted[place.parameter], errors[place.parameter][0]
            sent = torch.where(place.live, _signs(flat) * self._spread(magnitudes, place, 0, flat.numel()), 0.0)
            worker_error.copy_((flat - sent)[: worker_error.numel()].view_as(worker_error))
            packed = _pack(flat.view(self._axis.size, place.chunk))
            wire[:, place.first_byte : place.first_byte + place.chunk // BITS] = packed
        return wire, magnitudes

    def _as_server(
        self, received: Tensor, magnitudes: Tensor, errors: Mapping[Parameter, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """(packed signs of this rank's chunks, magnitudes of all rows)."""
        averages = {}
        sums = torch.zeros_like(self._counts)
        for place in self._places:
            begin = self._axis.rank * place.chunk
            live = place.live[begin : begin + place.chunk]
            signs = _unpack(received[:, place.first_byte : place.first_byte + place.chunk // BITS])  # [ranks, chunk]
            mean = torch.zeros(place.chunk, device=signs.device)
            for rank in range(self._axis.size):
                mean += signs[rank] * self._spread(magnitudes[rank], place, begin, place.chunk)
            server_error = errors[place.parameter][1]
            mean = torch.where(live, mean / self._axis.size + _padded(server_error, place.chunk), 0.0)
            averages[place.parameter] = mean
            sums.index_add_(0, self._row_of(place, begin, place.chunk), mean.abs())
        self._reduce(sums, self._axis)
        serving = self._over_model(sums) / self._counts
        served = torch.empty(self._bytes, dtype=torch.uint8, device=sums.device)
        for place in self._places:
            begin = self._axis.rank * place.chunk
            live = place.live[begin : begin + place.chunk]
            mean, server_error = averages[place.parameter], errors[place.parameter][1]
            sent = torch.where(live, _signs(mean) * self._spread(serving, place, begin, place.chunk), 0.0)
            server_error.copy_((mean - sent)[: server_error.numel()])
            served[place.first_byte : place.first_byte + place.chunk // BITS] = _pack(mean.view(1, -1))[0]
        return served, serving

    def _to_servers(self, wire: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        axis = self._axis
        if axis.size == 1:
            return wire, magnitudes.unsqueeze(0)
        received = torch.empty_like(wire)
        dist.all_to_all_single(received, wire, group=axis.group)
        gathered = [torch.empty_like(magnitudes) for _ in range(axis.size)]
        dist.all_gather(gathered, magnitudes, group=axis.group)
        self._traffic.sent += wire.nbytes * self._ring(1) + magnitudes.nbytes * (axis.size - 1)
        return received, torch.stack(gathered)

    def _from_servers(self, served: Tensor) -> Tensor:
        axis = self._axis
        if axis.size == 1:
            return served.unsqueeze(0)
        gathered = [torch.empty_like(served) for _ in range(axis.size)]
        dist.all_gather(gathered, served, group=axis.group)
        self._traffic.sent += served.nbytes * (axis.size - 1)
        return torch.stack(gathered)

    def _over_model(self, sums: Tensor) -> Tensor:
        """Sums of rows that tensor parallelism cuts through, over its ranks; the others stay."""
        if self._model.size == 1 or not bool(self._through.any()):
            return sums
        parts = sums[self._through]
        dist.all_reduce(parts, group=self._model.group)
        whole = sums.clone()
        whole[self._through] = parts
        return whole

    def _reduce(self, sums: Tensor, axis: Axis) -> None:
        if axis.size > 1:
            dist.all_reduce(sums, group=axis.group)
            self._traffic.sent += sums.nbytes * self._ring(2)

    def _ring(self, passes: int) -> float:
        """Part of a buffer that a rank sends in that many passes around a ring."""
        return passes * (self._axis.size - 1) / self._axis.size

    def _row_of(self, place: _Place, begin: int, count: int) -> Tensor:
        """The row in the buffers of each of `count` elements from `begin` on; padding belongs to the last one."""
        places = torch.arange(begin, begin + count, device=place.live.device) // place.columns
        return places.clamp_(max=place.rows - 1) + place.first_row

    def _spread(self, magnitudes: Tensor, place: _Place, begin: int, count: int) -> Tensor:
        return magnitudes[self._row_of(place, begin, count)]


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor as it is compressed: a vector is one row."""
    if tensor.dim() < 2:
        return 1, tensor.numel()
    return tensor.shape[0], tensor.numel() // tensor.shape[0]


def _chunk(count: int, ranks: int) -> int:
    """Elements of a chunk: whole bytes of signs, as many for each rank."""
    return -(-count // (BITS * ranks)) * BITS


def _padded(values: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(values.flatten(), (0, count - values.numel()))


def _signs(values: Tensor) -> Tensor:
    """1 or -1; zero counts as positive."""
    return torch.where(values >= 0, 1.0, -1.0)


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(BITS)], dtype=torch.uint8, device=device)


def _pack(values: Tensor) -> Tensor:
    """Signs of [ranks, elements] as bytes [ranks, elements / 8]."""
    bits = (values >= 0).view(values.shape[0], -1, BITS).to(torch.uint8)
    return (bits * _powers(values.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor) -> Tensor:
    """Bytes [ranks, elements / 8] as 1 and -1, [ranks, elements]."""
    bits = packed.unsqueeze(-1).bitwise_and(_powers(packed.device)).ne(0)
    return torch.where(bits, 1.0, -1.0).flatten(1)
