"""The pipeline schedule of a run, and the stages of each rank."""

from __future__ import annotations

from megatron.config.config import Config
from megatron.pipe_schedule.layout import INTERLEAVED, ONE_F_ONE_B, PipeLayout

CHUNKS = 2
"""Stages of a rank under a schedule that has several, unless a key says otherwise."""


def pipe_layout(config: Config) -> PipeLayout:
    """Returns the schedule; one stage has nothing to schedule, whatever the key says."""
    axes = config.parallelism
    ranks = max(1, axes.pipe_parallel_size)
    if ranks == 1 or axes.pipe_schedule == ONE_F_ONE_B:
        return PipeLayout(ONE_F_ONE_B, ranks)
    blocks = axes.num_layers_per_virtual_pipeline_stage
    chunks = CHUNKS
    if axes.pipe_schedule == INTERLEAVED and blocks:
        chunks = max(1, (config.model.num_layers or 0) // (ranks * blocks))
    elif axes.pipe_schedule == INTERLEAVED and isinstance(axes.pipe_partition_method, tuple):
        chunks = max(CHUNKS, len(axes.pipe_partition_method) // ranks)
    return PipeLayout(axes.pipe_schedule, ranks, chunks)
