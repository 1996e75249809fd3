"""Memory of the keys and values that the service reserves for all texts at a time, before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.errors import ConfigError
from megatron.param_table import ModelDims
from megatron.registry import WITHOUT_ATTENTION

GIB = 2**30


@dataclass(frozen=True)
class CacheSize:
    """What the size of keys and values depends on."""

    dims: ModelDims
    """Sizes of the model."""
    rows: int
    """Texts at a time."""
    length: int
    """Longest text [tokens]."""
    width: int
    """Bytes of a value."""
    pipe_size: int = 1
    """Pipeline-parallel degree."""
    model_size: int = 1
    """Tensor-parallel degree."""
    modules: int = 0
    """Modules that draft tokens, each with a cache of its own."""

    @property
    def row_bytes(self) -> int:
        """Keys and values of one text of the longest length, on one rank [bytes]."""
        dims = self.dims
        of_all = sum(dims.kind(block) not in WITHOUT_ATTENTION for block in range(dims.num_layers))
        attending = min(of_all, -(-dims.num_layers // self.pipe_size))
        positions = attending * self.length + self.modules * (self.length + self.modules + 1)  # drafts reach further
        return positions * dims.cached_per_token(self.model_size) * self.width


def check_cache(size: CacheSize, memory: int) -> None:
    """Raises ConfigError where the keys and values of all texts need more than all of a rank's memory [bytes]."""
    needed = size.rows * size.row_bytes
    if needed <= memory:
        return
    fits, shorter = size.rows * memory // needed, f"a seq_length of {size.length * memory // needed:,}"
    raise ConfigError.of(
        f"the keys and values of {size.rows} texts of {size.length:,} tokens take {needed / GIB:.1f} GiB, and a rank "
        f"has {memory / GIB:.1f} GiB of memory",
        key="generation_batch_size",
        value=size.rows,
        hint=f"less than {fits + 1} texts at a time fit, or {shorter}" if fits else f"set {shorter} or less",
    )
