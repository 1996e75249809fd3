"""Rules for pipeline schedules with several stages a rank."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.derived.batch_rampup import BatchRampup
from megatron.config.derived.fill import trains
from megatron.config.derived.pipe_layout import pipe_layout
from megatron.errors import ConfigIssue
from megatron.pipe_schedule.layout import INTERLEAVED, SPLIT, PipeLayout


def chunks_hold_blocks(config: Config) -> Iterator[ConfigIssue]:
    """Every stage has a block, and stages of a given number of blocks make up the model."""
    axes, layers = config.parallelism, config.model.num_layers
    assert layers
    layout = pipe_layout(config)
    if layout.ranks == 1 or layout.ranks > layers:
        return
    blocks = axes.num_layers_per_virtual_pipeline_stage
    if axes.pipe_schedule == INTERLEAVED and blocks is not None:
        yield from _blocks_divide(blocks, layers, layout.ranks)
    elif layout.stages > layers and not isinstance(axes.pipe_partition_method, tuple):
        yield ConfigIssue(
            f"{layout.ranks} ranks have {layout.stages} stages, and there are only {layers} blocks",
            key="pipe_schedule",
            value=axes.pipe_schedule,
            hint=f"use a pipe_parallel_size of at most {layers // layout.chunks}, or pipe_schedule: 1f1b"
            if layers >= 2 * layout.chunks
            else "use pipe_schedule: 1f1b",
        )


def _blocks_divide(blocks: int, layers: int, ranks: int) -> Iterator[ConfigIssue]:
    key = "num_layers_per_virtual_pipeline_stage"
    share, rest = divmod(layers, ranks)
    if rest:
        yield ConfigIssue(
            f"the {layers} blocks do not divide by pipe_parallel_size = {ranks}",
            key=key,
            value=blocks,
            hint="leave it out; pipe_partition_method gives each stage its blocks",
        )
    elif not 1 <= blocks < share or share % blocks:
        legal = [str(one) for one in range(1, share) if share % one == 0]
        yield ConfigIssue(
            f"a rank has {share} blocks, which it does not cut into several stages",
            key=key,
            value=blocks,
            hint=f"write {' or '.join(legal)}" if legal else "use fewer ranks, or pipe_schedule: 1f1b",
        )


def schedule_takes_micro_batches(config: Config) -> Iterator[ConfigIssue]:
    """The schedule takes the micro batches of every step."""
    layout, training = pipe_layout(config), config.training
    if layout.chunks == 1 or not trains(config.launch.user_script):
        return
    assert training.gradient_accumulation_steps
    assert training.train_batch_size
    samples = training.train_batch_size // training.gradient_accumulation_steps  # of a micro batch on all ranks
    sizes = BatchRampup.of(training.train_batch_size, training.rampup_batch_size).sizes()
    for size in sizes:
        count = size // max(1, samples)
        if count >= 1 and size % samples == 0 and not layout.takes(count):
            yield _not_taken(config, layout, count, grows=len(sizes) > 1)
            return


def _not_taken(config: Config, layout: PipeLayout, count: int, *, grows: bool) -> ConfigIssue:
    nearest = " or ".join(map(str, layout.nearest(count)))
    what = f"{layout.schedule} on {layout.ranks} ranks does not take a step of {count} micro batches"
    key = "rampup_batch_size" if grows else "gradient_accumulation_steps"
    value = getattr(config.training, key)
    hint = f"the nearest it takes: {nearest}"
    return ConfigIssue(what, key=key, value=list(value) if isinstance(value, tuple) else value, hint=hint)


def schedule_fits_other_keys(config: Config) -> Iterator[ConfigIssue]:
    """What depends on the order of passes, or on how gradients of weights are computed, is not combined."""
    layout = pipe_layout(config)
    if layout.chunks > 1 and config.recompute.contiguous_checkpointing:
        yield ConfigIssue(
            "DeepSpeed's buffer for saved activations is filled and emptied one micro batch at a time",
            key="contiguous_checkpointing",
            value=True,
            hint="leave it out, or use pipe_schedule: 1f1b",
        )
    if layout.schedule not in SPLIT:
        return
    used = {
        "compile": config.kernels.compile,
        "fp8": config.precision.fp8 is not None,
        **{key: getattr(config.transformer_engine, key) for key in config.transformer_engine.layers},
    }
    for key, value in used.items():
        if value:
            yield ConfigIssue(
                f"with {key} a layer computes the gradient of its weight at once, and {layout.schedule} needs it apart",
                key="pipe_schedule",
                value=layout.schedule,
                hint=f"use interleaved, or leave {key} out",
            )
