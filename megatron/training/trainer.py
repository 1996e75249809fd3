"""Composition root of training: builds everything, in order.

1 process group and topology; 2 tokenizer, the checkpoint to load where every rank can read it, padded vocabulary;
3 data; 4 model, optimizer and engine, with the weights of a checkpoint if there is one; 5 the rest of the checkpoint;
6 hooks and the loop; 7 final evaluation, sinks closed.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from megatron.adapter_config import soft_prompt
from megatron.checkpoint.format.layout import same_folder
from megatron.checkpoint.load.loader import Checkpoint, find_checkpoint, make_available, restore
from megatron.checkpoint.load.run_inputs_check import RunInputs
from megatron.checkpoint.save.folder_check import check_writable, claim, sole_writer
from megatron.checkpoint.save.folder_programs import FolderPrograms
from megatron.checkpoint.save.saver import Counters, Saver
from megatron.config import Config
from megatron.config.derived.batch_rampup import BatchRampup
from megatron.config.derived.curriculum import curriculum_lengths
from megatron.config.derived.retrieval import sequences_of_sample
from megatron.config.validation.unknown_values import require
from megatron.data.dataset.builder import Data
from megatron.distributed.init import shutdown
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import any_rank, device
from megatron.distributed.timeouts import set_collective_timeout
from megatron.engine.base import BaseEngine
from megatron.engine.batch_copies import DeviceCopies
from megatron.engine.builder import DTYPES, build_training_engine, init_topology
from megatron.engine.vocabulary import build_vocabulary, vocabulary_size
from megatron.errors import ConfigError
from megatron.evaluation.char_perplexity import Characters
from megatron.evaluation.runner import live_evaluation
from megatron.health.host_check import check_hosts
from megatron.health.straggler import StragglerMonitor
from megatron.health.watchdog import Watchdog
from megatron.launcher.restart import restarted_by_scheduler, resume_overrides
from megatron.launcher.worker import Stop
from megatron.log import get_logger
from megatron.metrics.builder import build_reporter
from megatron.metrics.memory import peak_memory_bytes
from megatron.metrics.peak_flops import find_peak
from megatron.metrics.reporter import Reporter
from megatron.metrics.timers import no_wait
from megatron.objectives.classification import ClassScores
from megatron.optim.lr_schedule import build as build_schedule
from megatron.param_table import ModelDims, tensors
from megatron.plan.report import model_flops
from megatron.registry import SCHEDULES
from megatron.tokenizers import Tokenizer
from megatron.tokenizers.builder import build_tokenizer
from megatron.tokenizers.vocab_limit import known_ids
from megatron.training.data_setup import (
    build_run_data,
    builds_index_maps,
    run_inputs,
    run_tokenizer,
    train_iters,
    with_length,
)
from megatron.training.evaluation_mark import EvaluationMark
from megatron.training.hooks.activity import ActivityHook
from megatron.training.hooks.base import Hook, Hooks
from megatron.training.hooks.recordings import recording_hooks
from megatron.training.hooks.statistics import statistics_hooks
from megatron.training.hooks.stragglers import StragglerHook
from megatron.training.hooks.task_evaluation import TaskEvaluationHook
from megatron.training.locate_failure import FailureLocator
from megatron.training.loop import run_loop
from megatron.training.loop_context import LoopContext, TrainSchedule
from megatron.training.loss_guard import LossGuard
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSizes
from megatron.training.task_setup import task_hook, task_of, with_pretrained
from megatron.training.validation import evaluation_metrics

_log = get_logger(__name__)


def train(config: Config, stop: Stop) -> None:
    """Trains as configured. Collective: every worker calls it with the same configuration.

    Raises ConfigError for errors that only show here (missing data, nothing to load), RunError for later errors.
    """
    topology = init_topology(config)
    config = _alike_after_a_restart(config)
    folder = config.observe.folder
    watchdog = Watchdog(topology, folder, config.launch.collective_timeout)
    try:
        writer = sole_writer(config.checkpoint.save, leads=builds_index_maps(config))
        with watchdog.guard(), writer:
            alike = repr(config.replace(rank=None, local_rank=None, log_dir=None))
            hosts = check_hosts(alike, folder, shared=config.data.use_shared_fs)
            _train(config, topology, stop, watchdog, hosts)
    finally:
        shutdown()


def _alike_after_a_restart(config: Config) -> Config:
    """Makes a restart the same on every rank: torchrun counts restarts on each host separately."""
    again = any_rank(restarted_by_scheduler(os.environ))
    return config.replace(**resume_overrides(config)) if again else config


def _train(config: Config, topology: Topology, stop: Stop, watchdog: Watchdog, hosts: Sequence[str]) -> None:
    leads = builds_index_maps(config)
    if config.task.task_predictions is not None:
        check_writable(config.task.task_predictions, leads=leads, key="task_predictions", what="predictions")
    if config.checkpoint.save_hf_every is not None:
        from megatron.training.huggingface_folder import check_family  # reads every family

        check_family(config.model, config.moe, config.mixers, config.mup, config.checkpoint.hf_architecture)
    tokenizer = build_tokenizer(config.tokenizer)
    make_available(config.checkpoint, shared=config.data.use_shared_fs)
    config = with_pretrained(config)
    tokenizer, vocabulary = build_vocabulary(config, topology, tokenizer, may_grow=config.checkpoint.finetune)
    ids = vocabulary_size(config, tokenizer, vocabulary)
    if ids > known_ids(tokenizer):
        config = config.replace(vocab_size=ids)  # for the checkpoints of this run, whose tokenizer does not say it
    checkpoint = _starting_point(config, vocabulary, tokenizer)
    start = checkpoint.counters() if checkpoint else Counters()
    task = task_of(config, tokenizer)
    config = with_length(config, start, tokenizer, task)
    data = build_run_data(config, topology, tokenizer, start, task)
    inputs = run_inputs(config, data, tokenizer, checkpoint)
    _claim_folder(config, checkpoint, inputs, leads=leads)
    evaluated = _evaluation_mark(config, checkpoint, leads=leads)
    config = checkpoint.schedule(config) if checkpoint else config
    engine = build_training_engine(
        config,
        topology,
        padded_vocab_size=vocabulary,
        vocab_size=ids,
        checkpoint=checkpoint,
        prompt_tokens=_prompt_tokens(config, tokenizer),
        scores=(scores := ClassScores()),
    )
    counters = restore(checkpoint, engine) if checkpoint else Counters()
    state = RunState.from_counters(counters)
    settings = config.without_secrets().flat()
    reporter = build_reporter(
        config.observe, topology.rank, start_iteration=state.iteration, settings=settings, hosts=hosts
    )
    saver: Saver | None = None
    try:
        schedule = _train_schedule(config, topology, vocabulary, reporter)
        saver = _saver(config, engine, vocabulary, checkpoint, inputs, reporter.message)
        tasks = live_evaluation(config, engine, tokenizer, topology, stop_requested=lambda: stop.requested)
        hooks: list[Hook] = [
            ActivityHook(watchdog),
            StragglerHook(StragglerMonitor(topology.rank, hosts, device(), config.observe.folder, reporter.message)),
            *recording_hooks(config.observe, engine, log=reporter.message),
            *statistics_hooks(
                config.observe, engine, max_norm=config.optimizer.gradient_clipping, due=schedule.reports
            ),
            *_loss_guard(config, engine, data, reporter),
            *([TaskEvaluationHook(tasks, reporter, watchdog)] if tasks is not None else []),
            *([task_hook(config, topology, task, scores, reporter)] if task is not None and task.valid else []),
        ]
        characters = Characters(tokenizer) if config.training.char_level_ppl else None
        context = _loop_context(config, engine, data, reporter, stop, saver, evaluated, Hooks(hooks), characters)
        set_collective_timeout(config.launch.collective_timeout)
        _log_setup(config, topology, data, state, reporter)
        _freeze_gc()
        stop.listen()
        with watchdog.activity("between two steps"):  # unlike the start, nothing there may take long
            reason = run_loop(schedule, context, state)
        if saver is not None:
            saver.finish()
        if reason is not None:
            reporter.message(f"stopped after iteration {state.iteration}: {reason}")
        elif data.test is not None and schedule.eval_iters > 0:
            _test(schedule, context, data, state)
    except BaseException:
        if saver is not None:
            saver.abandon()
        raise
    finally:
        reporter.close()


def _starting_point(config: Config, vocabulary: int, tokenizer: Tokenizer) -> Checkpoint | None:
    """Returns the checkpoint to continue from, after checking the tokenizer. Collective."""
    table = tensors(ModelDims.of(config.model, config.moe, config.mixers), vocabulary)
    return find_checkpoint(config, table, tokenizer=run_tokenizer(config, tokenizer))


def _claim_folder(config: Config, checkpoint: Checkpoint | None, inputs: RunInputs, *, leads: bool) -> None:
    """Claims the save folder, after checking the order of the data. Collective.

    leads: true if this rank may move files, one rank for each file system.
    """
    if checkpoint is not None:
        checkpoint.require_data_order(inputs, override=config.checkpoint.override_data_order)
    if config.checkpoint.save is not None:
        continues = checkpoint is not None and not checkpoint.from_start
        claim(config.checkpoint, checkpoint.directory if checkpoint and continues else None, leads=leads)


def _evaluation_mark(config: Config, checkpoint: Checkpoint | None, *, leads: bool) -> EvaluationMark | None:
    """Returns the file that names the last complete evaluation; None where nothing is saved."""
    if config.checkpoint.save is None:
        return None
    save = Path(config.checkpoint.save)
    continues = checkpoint is not None and not checkpoint.from_start
    own = continues and checkpoint is not None and same_folder(checkpoint.directory.parent, save)
    return EvaluationMark(save, resumes=own, leads=leads)


def _prompt_tokens(config: Config, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens whose vectors initialize a soft prompt; empty if it is drawn, or there is none."""
    prompt = soft_prompt(config.model.soft_prompt_tuning)
    if prompt is None or not prompt.init_string:
        return []
    tokens = list(tokenizer.encode(prompt.init_string))
    if not tokens:
        what = "init_string has no token"
        raise ConfigError.of(what, key="soft_prompt_tuning", value=config.model.soft_prompt_tuning)
    return tokens


def _train_schedule(config: Config, topology: Topology, vocabulary: int, reporter: Reporter) -> TrainSchedule:
    training, checkpoint, model = config.training, config.checkpoint, config.model
    batch = require(training.train_batch_size)
    table = tensors(ModelDims.of(model, config.moe, config.mixers), vocabulary)
    peak = find_peak(device(), DTYPES[require(config.precision.precision)], config.observe.peak_theoretical_tflops)
    reporter.message(f"model FLOPs utilisation is against {peak}")
    return TrainSchedule(
        total=train_iters(config),
        log_interval=config.observe.log_interval,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
        exit_interval=training.exit_interval,
        exit_minutes=training.exit_duration,
        save_scale=checkpoint.checkpoint_scale,
        save_factor=checkpoint.checkpoint_factor,
        save_extra=tuple(checkpoint.extra_save_iters or ()),
        samples=batch,
        micro_batches=require(training.gradient_accumulation_steps),
        sizes=StepSizes(
            BatchRampup.of(batch, training.rampup_batch_size),
            samples_per_micro_batch=require(training.train_micro_batch_size_per_gpu) * topology.data.size,
            rows=sequences_of_sample(config),
            lengths=curriculum_lengths(config.deepspeed.curriculum_learning, require(model.seq_length)),
            max_length=require(model.seq_length),
        ),
        flops=cache(
            lambda length: model_flops(config, table, seq_length=length, train_batch_size=1) / topology.world_size
        ),
        peak_flops=peak.flops_per_second,
        overflow_limit=config.precision.overflow_limit,
        counts_samples=training.train_samples is not None,
    )


def _loop_context(
    config: Config,
    engine: BaseEngine,
    data: Data,
    reporter: Reporter,
    stop: Stop,
    saver: Saver | None,
    evaluated: EvaluationMark | None,
    hooks: Hooks,
    characters: Characters | None,
) -> LoopContext:
    section = config.schedule
    horizon = section.lr_decay_samples if config.training.train_samples is not None else section.lr_decay_iters
    lr_schedule = build_schedule(
        SCHEDULES.load(section.lr_decay_style),
        max_lr=require(config.optimizer.lr),
        min_lr=section.min_lr,
        warmup_fraction=section.warmup,
        warmup=section.warmup_iters,
        horizon=require(horizon),
        decay_fraction=section.wsd_decay_fraction,
        decay_shape=section.wsd_decay_style,
        batch=require(config.training.train_batch_size),
        tokens_per_step=require(config.model.seq_length)
        * (1 if config.training.train_samples is not None else require(config.training.train_batch_size)),
        keys={key: getattr(section, key) for key in SCHEDULES.entry(section.lr_decay_style).settings},
    )
    return LoopContext(
        engine=engine,
        lr_schedule=lr_schedule,
        train=data.train,
        valid=data.valid,
        valid_sets=data.valid_sets,
        reporter=reporter,
        stop_requested=lambda: stop.requested,
        save=_save(saver, reporter) if saver else None,
        check_saves=saver.check if saver else no_wait,
        synchronize=torch.cuda.synchronize if torch.cuda.is_available() else no_wait,
        to_device=DeviceCopies(device()),
        outcome_lag=int(torch.cuda.is_available()),
        peak_memory=lambda: peak_memory_bytes(device()),
        hooks=hooks,
        evaluated=evaluated,
        characters=characters,
        saved_weights=engine.saved_weights,
        average=engine.moving_average,
    )


def _saver(
    config: Config,
    engine: BaseEngine,
    vocabulary: int,
    checkpoint: Checkpoint | None,
    inputs: RunInputs,
    say: Callable[[str], None],
) -> Saver | None:
    if config.checkpoint.save is None:
        return None
    loaded, every = checkpoint.directory if checkpoint else None, config.checkpoint.save_hf_every
    command = (sys.executable, "-m", "megatron.training.huggingface_folder")
    programs = None if every is None else FolderPrograms(command, every, "huggingface", say)
    continues = checkpoint is not None and not checkpoint.from_start
    return Saver(
        config,
        engine,
        padded_vocab_size=vocabulary,
        loaded=loaded,
        continues=continues,
        inputs=inputs,
        programs=programs,
    )


def _save(saver: Saver, reporter: Reporter) -> Callable[[RunState], None]:
    def save(state: RunState) -> None:
        directory = saver.save(state.counters())
        how = "saving" if saver.config.checkpoint.checkpoint_async else "saved"
        reporter.message(f"{how} {directory}")

    return save


def _freeze_gc() -> None:
    """Freezes long-lived objects: a full collection would stall this rank for about half a second."""
    gc.collect()
    gc.freeze()


def _loss_guard(config: Config, engine: BaseEngine, data: Data, reporter: Reporter) -> list[Hook]:
    """Returns the guard of the loss; none without training data."""
    training = config.training
    if data.train is None:
        return []
    locator = FailureLocator(engine, data.train, require(training.train_micro_batch_size_per_gpu))
    scaled = config.precision.precision == "fp16"
    return [LossGuard(locator, training.on_nan, config.observe.loss_spike_factor, scaled, reporter.message)]


def _log_setup(config: Config, topology: Topology, data: Data, state: RunState, reporter: Reporter) -> None:
    reporter.message(
        f"{topology.world_size} rank(s): pipe {topology.pipe.size} x data {topology.data.size} x "
        f"context {topology.context.size} x model {topology.model.size}, ZeRO {config.deepspeed.zero_stage}, "
        f"{config.precision.precision}"
    )
    reporter.message(str(data.plan))
    if state.iteration:
        reporter.message(f"continuing after iteration {state.iteration}, sample {state.consumed_samples}")
    if state.iteration >= train_iters(config):
        reporter.message(f"nothing is left to train: the run ends at iteration {train_iters(config)} (train_iters)")


def _test(schedule: TrainSchedule, context: LoopContext, data: Data, state: RunState) -> None:
    """Reports the loss on the test split, from its first sample on."""
    assert data.test is not None
    metrics = evaluation_metrics(schedule, context, context.hooks.batches(data.test, "test"))
    if metrics:
        context.reporter.evaluation(state.iteration, "test", metrics)
