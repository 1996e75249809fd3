"""Cut the input among machines: shard I of N, so that the outputs, merged in order, equal those of one machine.

The input files lie one after another on a line of bytes, as they are on disk; shard I has the I-th Nth of it. Of a file
of lines that is not compressed it takes the lines that start there; any other file goes to the shard in whose part it
starts, whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.data.preprocess.reader import BLOCK_BYTES, TextBlock, read_file
from megatron.data.preprocess.text_files import Kind, TextFile
from megatron.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """number: from 0. count: of all shards."""

    number: int = 0
    """Number of the shard, from 0."""
    count: int = 1
    """Number of shards."""

    def prefix(self, output_prefix: str) -> str:
        """The output prefix of this shard: names sort in the order of the shards."""
        if self.count == 1:
            return output_prefix
        return f"{output_prefix}-{self.number:05}-of-{self.count:05}"

    def part(self, size: int) -> range:
        """Which of so many bytes belong to this shard."""
        return range(size * self.number // self.count, size * (self.number + 1) // self.count)


def parse_shard(text: str) -> Shard:
    """`I/N`, with I from 0 to N - 1. Raises ConfigError."""
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and int(number) < int(count):
        return Shard(int(number), int(count))
    raise ConfigError.of(
        "a shard is I/N, and I counts from 0 to N - 1",
        key="shard",
        value=text,
        hint="of 4 machines the first takes 0/4 and the last 3/4",
    )


def shard_blocks(files: Sequence[TextFile], shard: Shard, block_bytes: int = BLOCK_BYTES) -> Iterator[TextBlock]:
    """The blocks of a shard, in order; read_bytes counts from its start. Raises as read_blocks."""
    total = sum(file.bytes for file in files)
    part = shard.part(total)
    last = shard.number == shard.count - 1
    before = 0
    for file in files:
        inside = range(max(part.start - before, 0), min(part.stop - before, file.bytes))
        if file.bytes and not file.compressed and file.kind is Kind.LINES:
            if inside:
                yield from read_file(file, block_bytes, before - part.start, inside)
        elif part.start <= before < part.stop or (last and before == total):  # an empty file may be at the end
            yield from read_file(file, block_bytes, before - part.start)
        before += file.bytes
