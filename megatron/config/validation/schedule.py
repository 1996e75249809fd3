"""Rules for the length of a run, the learning rate schedule, batch ramp-up and the curriculum."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.derived.batch_rampup import BatchRampup
from megatron.config.derived.curriculum import curriculum_issues
from megatron.config.derived.fill import trains
from megatron.errors import ConfigIssue
from megatron.registry import SCHEDULES


def warmup_is_a_part(config: Config) -> Iterator[ConfigIssue]:
    """The warmup is a fraction of the decay horizon; warmup_iters counts it in steps."""
    schedule = config.schedule
    warmup, steps = schedule.warmup, schedule.warmup_iters
    if steps is not None:
        if steps < 0:
            yield ConfigIssue("it cannot be negative", key="warmup_iters", value=steps)
        if schedule.lr_decay_samples is not None:
            hint = "give warmup, a part of the horizon"
            yield ConfigIssue("the horizon counts samples (train_samples)", key="warmup_iters", value=steps, hint=hint)
        return
    if 0 <= warmup <= 1:
        return
    horizon = schedule.lr_decay_iters
    hint = "it is a part of the decay horizon, such as 0.01"
    if warmup > 1 and horizon and horizon > warmup:
        share = f"{warmup:g} of {horizon:,} steps are {warmup / horizon:.3g}"
        hint = f"it is a part of the decay horizon: {share}"
        hint += f"; or write warmup_iters: {warmup:g}" if warmup == int(warmup) else ""
    yield ConfigIssue("it must be between 0 and 1", key="warmup", value=warmup, hint=hint)


def warmup_ends_before_the_horizon(config: Config) -> Iterator[ConfigIssue]:
    """The warmup is shorter than the horizon."""
    schedule = config.schedule
    if not trains(config.launch.user_script):
        return
    counts = "lr_decay_iters" if schedule.lr_decay_samples is None else "lr_decay_samples"
    horizon = getattr(schedule, counts)
    if not horizon:
        return
    name = "warmup" if schedule.warmup_iters is None else "warmup_iters"
    length = schedule.warmup_length(horizon)
    if 0 < horizon <= length:
        yield ConfigIssue(
            f"the warmup is {length:,} {'steps' if counts == 'lr_decay_iters' else 'samples'} long and the decay ends "
            f"at {horizon:,} ({counts})",
            key=name,
            value=getattr(schedule, name),
            hint="give a shorter warmup, or a longer horizon",
        )


def learning_rates_are_ordered(config: Config) -> Iterator[ConfigIssue]:
    """min_lr is not above lr; the schedule has one source on resuming."""
    lr, min_lr = config.optimizer.lr, config.schedule.min_lr
    if lr is not None and min_lr > lr:
        yield ConfigIssue(f"it is above the learning rate {lr}", key="min_lr", value=min_lr)
    if config.schedule.override_lr_scheduler and config.schedule.use_checkpoint_lr_scheduler:
        yield ConfigIssue(
            "override_lr_scheduler asks for the opposite",
            key="use_checkpoint_lr_scheduler",
            value=True,
            hint="keep one",
        )


def infinite_schedules_have_their_rates(config: Config) -> Iterator[ConfigIssue]:
    """The constant rate is between min_lr and lr, and the parts of the horizon follow each other."""
    schedule, lr = config.schedule, config.optimizer.lr
    if "infinite_constant_lr" not in SCHEDULES.entry(schedule.lr_decay_style).settings or lr is None:
        return
    constant, min_lr = schedule.infinite_constant_lr, schedule.min_lr
    if constant is None or not 0 < min_lr <= constant <= lr:
        yield ConfigIssue(
            f"{schedule.lr_decay_style} cools down from lr = {lr} to it, and anneals from it to min_lr = {min_lr}",
            key="infinite_constant_lr",
            value=constant,
            hint="give 0 < min_lr <= infinite_constant_lr <= lr",
        )
    horizon = schedule.lr_decay_iters if schedule.lr_decay_samples is None else schedule.lr_decay_samples
    warmup = schedule.warmup_length(horizon) / horizon if horizon else schedule.warmup
    parts = warmup + schedule.infinite_cooldown_fraction + schedule.infinite_anneal_fraction
    if parts > 1:
        yield ConfigIssue(
            f"with the warmup and infinite_anneal_fraction these parts are {parts:.3g} of the horizon",
            key="infinite_cooldown_fraction",
            value=schedule.infinite_cooldown_fraction,
            hint="give parts that add up to 1 at most",
        )


def run_has_a_length(config: Config) -> Iterator[ConfigIssue]:
    """Exactly one of train_iters, train_epochs and train_samples is given."""
    if not trains(config.launch.user_script):
        return
    names = ("train_iters", "train_epochs", "train_samples")
    given = [name for name in names if getattr(config.training, name) is not None]
    if not given:
        yield ConfigIssue("the length of the run is not given", key="train_iters", hint="give train_iters")
    if len(given) > 1:
        yield ConfigIssue(f"{' and '.join(given)} are both given", key=given[1], hint="keep one of them")
    for name in given:
        value = getattr(config.training, name)
        if value < 0 or (value == 0 and name != "train_iters"):
            yield ConfigIssue("a run cannot have this length", key=name, value=value)


def horizon_has_the_unit_of_the_run(config: Config) -> Iterator[ConfigIssue]:
    """A run with a length in samples decays over samples, one in steps over steps."""
    schedule, samples = config.schedule, config.training.train_samples
    if samples is not None and schedule.lr_decay_iters is not None:
        yield ConfigIssue(
            "the run's length is given in samples",
            key="lr_decay_iters",
            value=schedule.lr_decay_iters,
            hint="give lr_decay_samples",
        )
    if samples is None and schedule.lr_decay_samples is not None:
        yield ConfigIssue(
            "the run's length is not given in samples",
            key="lr_decay_samples",
            value=schedule.lr_decay_samples,
            hint="give train_samples in place of train_iters, or lr_decay_iters",
        )
    full = config.training.train_batch_size
    if samples is not None and full is not None and 0 < samples < full and config.training.rampup_batch_size is None:
        yield ConfigIssue(f"a step takes {full}", key="train_samples", value=samples, hint="raise it")


def rampup_sizes_divide(config: Config) -> Iterator[ConfigIssue]:
    """Every batch size of the ramp-up divides into micro batches on every data-parallel rank."""
    training = config.training
    ramp, full, micro = training.rampup_batch_size, training.train_batch_size, training.train_micro_batch_size_per_gpu
    if ramp is None or full is None or micro is None or not trains(config.launch.user_script):
        return
    form = f"write [first size, increment, samples], such as [{micro}, {micro}, {100 * full}]"
    if len(ramp) != 3 or min(ramp) < 1:
        yield ConfigIssue("these are not three counts", key="rampup_batch_size", value=list(ramp), hint=form)
        return
    first, increment, _ = ramp
    if first > full or (full - first) % increment:
        yield ConfigIssue(
            f"from {first} in steps of {increment} there is no way to train_batch_size = {full}",
            key="rampup_batch_size",
            value=list(ramp),
            hint=form,
        )
        return
    share = micro * config.parallelism.data_parallel_size
    uneven = [size for size in BatchRampup.of(full, ramp).sizes() if size % share]
    if uneven:
        yield ConfigIssue(
            f"a step of {uneven[0]} samples is not whole micro batches of {micro} on "
            f"{config.parallelism.data_parallel_size} data-parallel ranks",
            key="rampup_batch_size",
            value=list(ramp),
            hint=f"use multiples of {share}, or a smaller micro batch",
        )
    if training.train_epochs is not None:
        yield ConfigIssue(
            "the length of the run is given in passes (train_epochs)",
            key="rampup_batch_size",
            value=list(ramp),
            hint="give train_samples or train_iters in place of train_epochs",
        )


def curriculum_is_supported(config: Config) -> Iterator[ConfigIssue]:
    """The curriculum is configured by curriculum_learning; DeepSpeed's data_efficiency is not supported."""
    block, length = config.deepspeed.curriculum_learning, config.model.seq_length
    axes, heads = config.parallelism, config.model.num_kv_heads
    assert length is not None
    assert heads is not None
    parts = axes.length_multiple(heads, zigzag=not config.model.in_order)
    if block and block.get("enabled", False):
        for what, hint in curriculum_issues(block, seq_length=length, parts=parts):
            yield ConfigIssue(what, key="curriculum_learning", value=block, hint=hint)
    efficiency = config.deepspeed.data_efficiency
    if efficiency and efficiency.get("enabled", True):
        yield ConfigIssue(
            "DeepSpeed's data sampler and token dropping are not supported",
            key="data_efficiency",
            value=efficiency,
            hint="for a curriculum over sequence lengths write curriculum_learning",
        )
