"""A run on the files of a task: its length in epochs, its data, and where its weights come from."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.huggingface.encoder_pair import is_folder
from megatron.checkpoint.load.find import find_intact
from megatron.checkpoint.load.loader import make_available
from megatron.checkpoint.remote.host_copy import by_host, one_folder
from megatron.config import Config
from megatron.config.derived.lr_schedule import decay_horizon
from megatron.config.derived.retrieval import DPR, passages_of_sample
from megatron.config.derived.task import CLASSES
from megatron.config.validation.unknown_values import require
from megatron.data.dataset.builder import Data
from megatron.data.retrieval.question_builder import QuestionData
from megatron.data.tasks.builder import TaskData
from megatron.data.tasks.samples import RowEncoder
from megatron.distributed.mesh import Topology
from megatron.errors import ConfigError
from megatron.metrics.reporter import Reporter
from megatron.objectives.classification import ClassScores
from megatron.tokenizers import Tokenizer
from megatron.tokenizers.masking import class_tokens
from megatron.training.hooks.base import Hook
from megatron.training.hooks.passage_ranks import PassageRanksHook
from megatron.training.hooks.task_scores import TaskScoresHook


def task_of(config: Config, tokenizer: Tokenizer) -> TaskData | None:
    """Returns the data of the task; None for a run that has none. Raises ConfigError for a vocabulary without [CLS]."""
    objective = config.training.train_impl
    if objective not in (CLASSES, DPR):
        return None
    choices, length = config.task.task_choices or 1, require(config.model.seq_length)
    encoder = RowEncoder(tokenizer, class_tokens(tokenizer), length, choices)
    if objective == DPR:
        return QuestionData(config.task, encoder, config.retrieval, config.training.seed)
    return TaskData(config.task, encoder)


def with_epochs(config: Config, task: TaskData) -> Config:
    """Returns the configuration with its length in steps, and an evaluation at the end of each epoch."""
    epochs, batch = config.training.train_epochs, require(config.training.train_batch_size)
    per_epoch = task.samples_per_epoch(batch) // batch
    if epochs is None:
        return config
    steps = epochs * per_epoch
    horizon = decay_horizon(steps, config.schedule.lr_decay_iters, config.schedule.lr_decay_fraction)
    return config.replace(train_iters=steps, lr_decay_iters=horizon, eval_interval=per_epoch)


def build_task_data(config: Config, topology: Topology, task: TaskData) -> Data:
    """Returns the loaders of this rank.

    Args:
        config: configuration of the run.
        topology: axes of this rank.
        task: rows of the task.
    """
    training = config.training
    batch = require(training.train_batch_size)
    return task.build(
        seed=training.seed,
        batch=batch,
        micro_batch=require(training.train_micro_batch_size_per_gpu),
        data_rank=topology.data.rank,
        data_size=topology.data.size,
        train_samples=require(training.train_iters) * batch,
        types=(config.model.num_token_types or 0) > (0 if isinstance(task, QuestionData) else 1),
        workers=config.data.num_workers,
    )


def task_hook(config: Config, topology: Topology, task: TaskData, scores: ClassScores, reporter: Reporter) -> Hook:
    """Returns what reports accuracies and writes predictions, or reports the ranks of right passages.

    Args:
        config: configuration of the run.
        topology: axes of this rank.
        task: rows of the task.
        scores: gets the logits or embeddings of this rank.
        reporter: receives the accuracies.
    """
    if isinstance(task, QuestionData):
        return PassageRanksHook(
            scores,
            task.valid_passages,
            topology,
            require(config.training.train_micro_batch_size_per_gpu),
            passages_of_sample(DPR, config.retrieval, valid=True),
            reporter,
            tops=config.retrieval.retrieval_report_topk_accuracies,
        )
    return TaskScoresHook(
        scores,
        task.valid,
        topology,
        require(config.training.train_micro_batch_size_per_gpu),
        reporter,
        labels=config.task.task_labels or (),
        folder=config.task.task_predictions,
    )


def with_pretrained(config: Config) -> Config:
    """Returns the configuration that loads `pretrained_checkpoint` where `load` has nothing to resume. Collective."""
    section = config.checkpoint
    if section.pretrained_checkpoint is None or _resumes(config):
        return config
    if not Path(section.pretrained_checkpoint).is_dir():
        what, value = "there is no such folder", section.pretrained_checkpoint
        raise ConfigError.of(what, key="pretrained_checkpoint", value=value, hint="give the save folder of an encoder")
    config = config.replace(load=section.pretrained_checkpoint, iteration=None, finetune=True, load_fallback="error")
    make_available(config.checkpoint, shared=config.data.use_shared_fs)
    return config


def _resumes(config: Config) -> bool:
    section = config.checkpoint
    if section.load is None:
        return False
    sharing = one_folder() if config.data.use_shared_fs else by_host()
    root = Path(section.load)
    return is_folder(root) or find_intact(root, section.iteration, section.load_fallback, sharing=sharing) is not None
