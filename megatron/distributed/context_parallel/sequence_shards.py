"""Which positions of a sequence each context-parallel rank has.

With Ulysses alone the shards follow each other. With a ring of r ranks causal attention would give the last rank r
times the work of the first, so a sequence is cut into 2 r chunks, and rank i has chunks i and 2 r - 1 - i: every rank
then sees as many keys as another (the zigzag order of public ring attentions). Where u Ulysses ranks are one member of
the ring, they have consecutive parts of its two chunks. Where blocks process the sequence in order, shards follow each
other also with a ring.

Shapes: b micro batch, s sequence, c context-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.distributed.mesh import Axis, Topology
from megatron.sequence_parts import sequence_multiple


@dataclass(frozen=True)
class SequenceShards:
    """The shards of this rank's sequences."""

    context: Axis = field(default_factory=lambda: Axis("context"))
    """Ranks that share a sequence."""
    ulysses: Axis = field(default_factory=lambda: Axis("ulysses"))
    """Those of them that exchange sequence shards for heads, neighbours along the axis."""
    ring: Axis = field(default_factory=lambda: Axis("ring"))
    """Those of them that pass keys and values on; context.rank is ring.rank * ulysses.size + ulysses.rank."""
    zigzag: bool = True
    """Whether members of a ring have two chunks each; false where blocks process the sequence in order."""

    @staticmethod
    def of(topology: Topology) -> SequenceShards:
        """Returns the shards of a layout."""
        return SequenceShards(topology.context, topology.ulysses, topology.ring, topology.zigzag)

    @property
    def multiple(self) -> int:
        """The number that divides the length of every sequence."""
        return sequence_multiple(self.context.size, self.ulysses.size, zigzag=self.zigzag)

    @property
    def in_order(self) -> bool:
        """Whether the positions of a shard follow each other."""
        return self.ring.size == 1 or not self.zigzag

    def shard(self, x: Tensor) -> Tensor:
        """Returns this rank's shard of full sequences: [b, s] -> [b, s/c]. ValueError if s does not divide."""
        if self.context.size == 1:
            return x
        length = x.shape[1]
        if length % self.multiple:
            raise ValueError(
                f"a sequence of {length} does not divide by {self.multiple}, as {self.context.size} context-parallel "
                f"ranks with a ring of {self.ring.size} need"
            )
        if self.in_order:
            return x.chunk(self.context.size, dim=1)[self.context.rank].contiguous()
        return x.index_select(1, self.positions(length // self.context.size, x.device))

    def shard_starts(self, starts: Tensor) -> Tensor:
        """Returns where the documents of this rank's positions start, counted from its first one, [b, s] -> [b, s/c].

        They are negative for a document that starts on a rank before. Only where shards follow each other.
        """
        if self.context.size == 1:
            return starts
        shard = self.shard(starts)
        return shard - self.first(shard.shape[1])

    def restore(self, x: Tensor) -> Tensor:
        """Puts the shards of all ranks, one behind the other [b, s, ...], into the order of the sequence."""
        return x if self.in_order else x[:, self._order(x.shape[1], x.device).argsort()]

    def first(self, length: int) -> int:
        """Returns the first position of this rank's shard. length: of the shard [tokens]."""
        assert self.in_order
        return self.context.rank * length

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Returns the positions of this rank's shard, increasing, int64 [s/c].

        Args:
            length: length of the shard [tokens].
            device: device of the result.
        """
        return self._order(self.context.size * length, device).chunk(self.context.size)[self.context.rank]

    def ring_positions(self, length: int, member: int, device: torch.device) -> Tensor:
        """Returns the positions that a member of the ring has after the exchange for heads, increasing, int64 [s/r].

        Args:
            length: length of its part [tokens].
            member: rank along the ring.
            device: device of the result.
        """
        return self._order(self.ring.size * length, device).chunk(self.ring.size)[member]

    def _order(self, length: int, device: torch.device) -> Tensor:
        """Returns the positions of the shards of all ranks, one behind the other, int64 [s]."""
        every = torch.arange(length, device=device)
        if self.in_order:
            return every
        chunks = every.view(2, self.ring.size, -1)  # the first half of the sequence, and the second
        return torch.stack((chunks[0], chunks[1].flip(0)), dim=1).flatten()
