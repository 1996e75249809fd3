"""Data of a run: its length, its loaders, and what checkpoints record of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron.adapter_config import low_rank, prompt_length, soft_prompt
from megatron.checkpoint.load.adapter_base import AdapterBase
from megatron.checkpoint.load.loader import Checkpoint
from megatron.checkpoint.load.run_inputs_check import RunInputs
from megatron.checkpoint.save.saver import Counters
from megatron.config import Config
from megatron.config.derived.batch_rampup import BatchRampup
from megatron.config.derived.encoder_decoder import FRAME, SPANS, usual_spans
from megatron.config.derived.lr_schedule import decay_horizon
from megatron.config.derived.retrieval import ICT
from megatron.config.schema.training import TrainingSection
from megatron.config.validation.unknown_values import require
from megatron.data.dataset.builder import Data, build_data, epoch_samples
from megatron.data.dataset.data_order import order_facts
from megatron.data.dataset.masked_builder import MaskedData, MaskedSamples
from megatron.data.dataset.span_builder import SpanData
from megatron.data.dataset.summary import DataPlan
from megatron.data.retrieval.block_builder import BlockData
from megatron.data.retro.loader import RetroData
from megatron.data.tasks.builder import TaskData
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import all_gather_list, barrier
from megatron.errors import ConfigError, RunError
from megatron.param_table import ModelDims
from megatron.ranks import Ranks
from megatron.registry import MASKED_HEAD
from megatron.tokenizer_info import TokenizerInfo, describe_tokenizer
from megatron.tokenizers import Tokenizer
from megatron.tokenizers.masking import class_tokens, masking_tokens, span_tokens
from megatron.tokenizers.vocab_limit import full_tokenizer, known_ids
from megatron.training.task_setup import build_task_data, with_epochs


def with_length(config: Config, start: Counters, tokenizer: Tokenizer, task: TaskData | None = None) -> Config:
    """Returns the configuration with its length in steps, computed from samples or epochs, which need the data.

    Args:
        config: configuration of the run.
        start: the counters that the run starts from. The batch size of the steps before may have been another one.
        tokenizer: tokenizer of the model.
        task: rows of the task that a classifier is trained on.
    """
    training, schedule = config.training, config.schedule
    full = require(training.train_batch_size)
    ramp = BatchRampup.of(full, training.rampup_batch_size)
    if training.train_samples is not None:
        steps = ramp.steps(training.train_samples, start.consumed_samples)
        return config.replace(train_iters=start.iteration + steps)
    if task is not None:
        return with_epochs(config, task)
    if training.train_epochs is None:
        return config
    samples = epoch_samples(
        config.data,
        epochs=training.train_epochs,
        seq_length=require(config.model.text_length),
        seed=training.seed,
        is_builder=builds_index_maps(config),
        barrier=barrier,
        masked=masked_data(config, tokenizer),
    )
    steps = start.iteration + ramp.steps(samples, start.consumed_samples)
    if steps < 1:
        raise ConfigError.of(
            f"{training.train_epochs} passes give {samples} samples, and a step takes {full}",
            key="train_epochs",
            value=training.train_epochs,
            hint="raise it, or lower train_batch_size",
        )
    horizon = decay_horizon(steps, schedule.lr_decay_iters, schedule.lr_decay_fraction)
    return config.replace(train_iters=steps, lr_decay_iters=horizon)


def build_run_data(
    config: Config,
    topology: Topology,
    tokenizer: Tokenizer,
    start: Counters | None = None,
    task: TaskData | None = None,
) -> Data:
    """Builds the data of a training run; collective. Raises ConfigError if there is nothing to train on.

    Args:
        config: Configuration of the run.
        topology: Axes of this rank.
        tokenizer: Tokenizer of the model.
        start: Counters that the run starts from; those of the first step unless given.
        task: Rows of the task that a classifier is trained on.
    """
    training = config.training
    start = start or Counters()
    if task is not None:
        return build_task_data(config, topology, task)
    samples = num_samples(training, train_iters(config), start, same_valid=config.data.valid_same_samples)
    data = build_data(
        config.data,
        eod=tokenizer.eod,
        seq_length=require(config.model.text_length),
        seed=training.seed,
        micro_batch=require(training.train_micro_batch_size_per_gpu),
        data_rank=topology.data.rank,
        data_size=topology.data.size,
        train_samples=samples["train"],
        valid_samples=samples["valid"],
        test_samples=samples["test"],
        is_builder=builds_index_maps(config),
        barrier=barrier,
        train_epochs=training.train_epochs,
        prompt=prompt_length(config.model.soft_prompt_tuning),
        tokenizer=run_tokenizer(config, tokenizer),
        ids=known_ids(tokenizer),
        mark_padding=config.moe.moe_num_experts > 1,
        masked=masked_data(config, tokenizer),
        retro=retro_data(config, tokenizer, samples),
    )
    if data.train is None and samples["train"]:
        raise ConfigError.of("there is nothing to train on", key="data_path", hint="set data_path or train_data_paths")
    require_same_data(data.plan)
    return data


def masked_data(config: Config, tokenizer: Tokenizer) -> MaskedSamples | None:
    """Returns how samples of masked tokens or spans are made; None for a language model.

    Raises ConfigError for a vocabulary without a mask or sentinels. config: configuration of the run. tokenizer: of the
    model.
    """
    data = config.data
    if config.training.train_impl == SPANS:
        return span_data(config, tokenizer)
    if config.training.train_impl == ICT:
        return block_data(config, tokenizer)
    if config.model.lm_head != MASKED_HEAD:
        return None
    return MaskedData(
        masking_tokens(tokenizer),
        sentence_order=bool(config.model.bert_binary_head),
        packed=data.pack_impl == "packed",
        mask_prob=data.mask_prob,
        max_ngram=data.mask_max_ngram,
        short_seq_prob=data.short_seq_prob,
    )


def retro_data(config: Config, tokenizer: Tokenizer, samples: Mapping[str, int]) -> RetroData | None:
    """Returns where neighbours are; None for a model without retrieval.

    Args:
        config: configuration of the run.
        tokenizer: of the model.
        samples: of train, valid and test that the run reads.
    """
    sizes = ModelDims.of(config.model, config.moe, config.mixers).retro
    if sizes is None:
        return None
    folder = Path(require(config.retrieval.retro_project_dir))
    return RetroData(folder, sizes, tokenizer.eod, run_tokenizer(config, tokenizer).fingerprint or "", samples)


def block_data(config: Config, tokenizer: Tokenizer) -> BlockData:
    """Returns how samples of sentences and blocks are made. Raises ConfigError for a vocabulary without separators.

    config: configuration of the run. tokenizer: of the model.
    """
    section = config.retrieval
    return BlockData(
        class_tokens(tokenizer),
        known_ids(tokenizer),
        types=(config.model.num_token_types or 0) > 0,
        query_in_block_prob=section.query_in_block_prob,
        one_sentence=section.use_one_sent_docs,
        titles_path=section.titles_data_path,
    )


def span_data(config: Config, tokenizer: Tokenizer) -> SpanData:
    """Returns how samples of span corruption are made.

    Raises ConfigError for a vocabulary without enough sentinels. config: configuration of the run. tokenizer: of the
    model.
    """
    data, length = config.data, require(config.model.encoder_seq_length)
    spans, _ = usual_spans(data.mask_prob, length - FRAME, data.mask_max_ngram, data.mask_mean_words)
    return SpanData(
        span_tokens(tokenizer, spans),
        encoder_length=length,
        decoder_length=require(config.model.decoder_seq_length),
        mask_prob=data.mask_prob,
        max_words=data.mask_max_ngram,
        mean_words=data.mask_mean_words,
        short_seq_prob=data.short_seq_prob,
    )


def require_same_data(plan: DataPlan) -> None:
    """Raises RunError on every rank where one reads other token files than rank 0, as on disks of their own.

    Collective over all ranks.
    """
    splits = {"train": plan.train, "valid": plan.valid, "test": plan.test}
    mine = [
        (name, source.path, source.documents, source.tokens, source.digest)
        for name, split in splits.items()
        for source in (split.sources if split is not None else ())
    ]
    ranks = all_gather_list(mine)
    for rank, found in enumerate(ranks):
        first, other = next(((a, b) for a, b in zip(ranks[0], found, strict=False) if a[2:] != b[2:]), (None, None))
        if first is None or other is None:
            continue
        raise RunError.of(
            f"rank {rank} reads another token file than rank 0: {other[2]:,} documents and {other[3]:,} tokens against "
            f"{first[2]:,} and {first[3]:,}, or other tokens",
            key="data_path",
            location=str(other[1]),
            hint="copy the same .bin and .idx files to every host",
        )


def run_inputs(config: Config, data: Data, tokenizer: Tokenizer, checkpoint: Checkpoint | None) -> RunInputs:
    """Returns what a checkpoint records of tokenizer and data, for comparison when it is loaded, and of adapters.

    Args:
        config: the configuration.
        data: the data sets.
        tokenizer: the tokenizer.
        checkpoint: what the run starts from; None for random weights.
    """
    order = data.plan.order
    if data.plan.train is not None:
        epochs = config.training.train_epochs
        masked = masked_data(config, tokenizer)
        facts = None if masked is None else masked.order_facts()
        order = order_facts(config.data, data.plan.train, seed=config.training.seed, train_epochs=epochs, masked=facts)
        retro = retro_data(config, tokenizer, {})
        order |= retro.order_facts() if retro is not None else {}
    return RunInputs(run_tokenizer(config, tokenizer), order, _adapter_base(config, checkpoint))


def _adapter_base(config: Config, checkpoint: Checkpoint | None) -> AdapterBase | None:
    """Returns the base of the run's adapters; None without adapters, or without a checkpoint."""
    model = config.model
    adapter = low_rank(model.lora)
    if checkpoint is None or (adapter is None and soft_prompt(model.soft_prompt_tuning) is None):
        return None
    trained = frozenset[str]() if adapter is None else adapter.trained(tied=not model.no_weight_tying)
    return checkpoint.adapter_base().with_trained(trained)


def run_tokenizer(config: Config, tokenizer: Tokenizer) -> TokenizerInfo:
    """Returns what a checkpoint records of the tokenizer."""
    return describe_tokenizer(config.tokenizer.tokenizer_type, full_tokenizer(tokenizer))


def train_iters(config: Config) -> int:
    """Returns the length of the run [steps]. Raises ConfigError if it is not set."""
    if config.training.train_iters is None:
        raise ConfigError.of("the number of steps is not set", key="train_iters", hint="set train_iters")
    return config.training.train_iters


def num_samples(
    training: TrainingSection, iterations: int, start: Counters, *, same_valid: bool = False
) -> dict[str, int]:
    """Returns the samples of train, valid and test that all ranks together use in a run.

    There is an evaluation every eval_interval iterations and one at the end. The samples of the steps before `start`
    are those that were consumed then, as train_batch_size may have been another one.

    Args:
        training: Batch sizes and intervals.
        iterations: Steps of the run.
        start: Counters that the run starts from.
        same_valid: True if all evaluations use the same samples.
    """
    batch = require(training.train_batch_size)
    per_evaluation = training.eval_iters * batch
    several = bool(training.eval_interval) and not same_valid
    evaluations = iterations // training.eval_interval + 1 if several else 1
    ramp = BatchRampup.of(batch, training.rampup_batch_size)
    left = iterations - start.iteration
    train = ramp.consumed(left, start.consumed_samples) if left > 0 else ramp.consumed(iterations)
    return {"train": train, "valid": evaluations * per_evaluation, "test": per_evaluation}


def builds_index_maps(config: Config) -> bool:
    """Returns whether this rank writes index maps for others: one rank of all, or one of each host."""
    ranks = Ranks.from_environment()
    return ranks.rank == 0 if config.data.use_shared_fs else ranks.local_rank == 0
