"""Rules for numbers, precision, checkpoints and measurements of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron.config.config import Config
from megatron.config.derived.fill import trains
from megatron.config.validation.optimizer import offloads
from megatron.errors import ConfigIssue

MOST_MEMORY = 1_000_000  # GiB
MOST_SEED = 2**32 - 1


def deepspeed_is_on(config: Config) -> Iterator[ConfigIssue]:
    """DeepSpeed is the only engine."""
    if not config.deepspeed.deepspeed:
        yield ConfigIssue(
            "training always runs through DeepSpeed", key="deepspeed", value=False, hint="leave the key out"
        )


def fractions_are_fractions(config: Config) -> Iterator[ConfigIssue]:
    """Probabilities and fractions are in [0, 1]."""
    sections = (config.model, config.schedule, config.generation)
    names = (
        "hidden_dropout",
        "attention_dropout",
        "lr_decay_fraction",
        "wsd_decay_fraction",
        "infinite_cooldown_fraction",
        "infinite_anneal_fraction",
        "top_p",
        "min_p",
    )
    for section in sections:
        for name in names:
            value = getattr(section, name, None)
            if value is not None and not 0 <= value <= 1:
                yield ConfigIssue("it must be between 0 and 1", key=name, value=value)


def counts_are_positive(config: Config) -> Iterator[ConfigIssue]:
    """Sizes and counts are positive, or not negative."""
    values = config.flat()
    for name in (
        "checkpoint_num_layers",
        "eval_interval",
        "log_interval",
        "keep_last_n_checkpoints",
        "make_vocab_size_divisible_by",
        "vocab_size",
        "padded_vocab_size",
        "moe_num_experts",
        "moe_top_k",
        "seed",
        "num_samples",
        "maximum_tokens",
        "repetition_penalty",
        "eval_limit",
        "eval_batch_size",
        "eval_overlap",
        "generation_batch_size",
        "serve_max_waiting",
        "exit_interval",
        "overflow_limit",
        "fingerprint_interval",
        "gpu_memory",
        "steps_per_print",
        "rotary_emb_base",
        "exit_duration",
        "collective_timeout",
        "global_num_gpus",
        "layernorm_epsilon",
        "rms_norm_epsilon",
    ):
        value = values[name]
        if value is not None and value <= 0:
            yield ConfigIssue("it must be more than 0", key=name, value=value)
    if (values["gpu_memory"] or 0) > MOST_MEMORY:
        yield ConfigIssue(f"at most {MOST_MEMORY:,}", key="gpu_memory", value=values["gpu_memory"])
    if (values["seed"] or 0) > MOST_SEED:
        what = f"at most {MOST_SEED:,}, the largest seed of the shuffled order of the data"
        yield ConfigIssue(what, key="seed", value=values["seed"])
    for name in (
        "weight_decay",
        "gradient_clipping",
        "min_lr",
        "lr",
        "eval_iters",
        "num_workers",
        "temperature",
        "top_k",
        "max_restarts",
        "iteration",
    ):
        value = values[name]
        if value is not None and value < 0:
            yield ConfigIssue("it cannot be negative", key=name, value=value)


def eos_tokens_are_ids(config: Config) -> Iterator[ConfigIssue]:
    """Token ids are not negative; the tokenizer checks their upper bound later."""
    ids = config.generation.eos_token_ids
    if ids is not None and any(number < 0 for number in ids):
        yield ConfigIssue("a token's id cannot be negative", key="eos_token_ids", value=list(ids))


def outliers_are_found_by_their_loss(config: Config) -> Iterator[ConfigIssue]:
    """A limit is above the mean, has losses to be taken from, and no loss scale that falls with each step left out."""
    value, window = config.training.skip_outlier_steps, config.training.outlier_window
    if value is None:
        return
    if value <= 0:
        yield ConfigIssue(
            "it is a number of standard deviations above the mean", "skip_outlier_steps", value, hint="6 is common"
        )
    if window < 4:
        yield ConfigIssue(
            "a mean and a deviation need losses", "outlier_window", window, hint="128 is common, 4 the least"
        )
    if config.precision.precision == "fp16":
        yield ConfigIssue(
            "every step that is left out lowers the loss scale of fp16",
            "skip_outlier_steps",
            value,
            hint="use bfloat16 or fp32, or leave it out",
        )


def left_out_steps_leave_no_gradients(config: Config) -> Iterator[ConfigIssue]:
    """DeepSpeed leaves gradients that are not finite in the host's memory, and applies no step after that."""
    if config.precision.precision != "bfloat16" or config.deepspeed.zero_stage not in (1, 2) or not offloads(config):
        return
    asked = {"skip_outlier_steps": config.training.skip_outlier_steps, "on_nan": config.training.on_nan}
    for key, value in asked.items():
        if value not in (None, "stop"):
            yield ConfigIssue(
                "in bfloat16 with offload_optimizer, ZeRO 1 and 2 apply no step after one that is left out",
                key=key,
                value=value,
                hint="use ZeRO stage 3, leave offload_optimizer out, or leave this out",
            )


def fp16_loss_needs_fp16(config: Config) -> Iterator[ConfigIssue]:
    """The loss can be computed in fp16 only where the logits are fp16."""
    if config.kernels.fp16_lm_cross_entropy and config.precision.precision != "fp16":
        yield ConfigIssue(
            f"the precision is {config.precision.precision}",
            key="fp16_lm_cross_entropy",
            value=True,
            hint="leave it out",
        )


def saving_is_scheduled(config: Config) -> Iterator[ConfigIssue]:
    """`save` needs checkpoint_factor or extra_save_iters."""
    saving = config.checkpoint
    factor = saving.checkpoint_factor
    if (
        trains(config.launch.user_script)
        and saving.save is not None
        and factor is None
        and saving.extra_save_iters is None
    ):
        yield ConfigIssue(
            "no interval of checkpoints is given",
            key="save",
            value=saving.save,
            hint="give checkpoint_factor (steps between checkpoints) or extra_save_iters",
        )
    if factor is None:
        return
    if saving.checkpoint_scale == "linear" and (factor < 1 or factor != int(factor)):
        yield ConfigIssue(
            "with checkpoint_scale linear it is a whole number of steps", key="checkpoint_factor", value=factor
        )
    if saving.checkpoint_scale == "log" and factor <= 1:
        yield ConfigIssue("with checkpoint_scale log it must be more than 1", key="checkpoint_factor", value=factor)


def loading_is_possible(config: Config) -> Iterator[ConfigIssue]:
    """`finetune` and `iteration` need `load`."""
    saved = config.checkpoint
    for key, requested in (("finetune", saved.finetune), ("iteration", saved.iteration is not None)):
        if saved.load is None and requested:
            hint = "give load, the folder of the checkpoint"
            yield ConfigIssue("nothing is loaded", key=key, value=getattr(saved, key), hint=hint)


def tokenizer_was_not_moved(config: Config) -> Iterator[ConfigIssue]:
    """Tokenizer files whose path is gone, while the folder at `load`, an imported model, has them beside it."""
    for key in ("vocab_file", "merge_file"):
        path = Path(getattr(config.tokenizer, key) or "")
        if config.checkpoint.load is None or not path.is_absolute() or path.exists():
            continue
        folder = Path(config.checkpoint.load) / "tokenizer"
        beside = [each for each in (folder / path.name, folder) if path.name and each.exists()]
        if beside:
            what = "there is no such file or folder; the model was moved, and has its tokenizer beside it"
            yield ConfigIssue(what, key=key, value=str(path), hint=f"set {key}: {beside[0]}")


_MIN_PART_SIZE = 5 << 20  # bytes, the minimum of S3


def buckets_are_addresses(config: Config) -> Iterator[ConfigIssue]:
    """`s3_path` is s3://bucket/folder; `save` and `load` are folders."""
    saved = config.checkpoint
    for name in ("save", "load"):
        value = getattr(saved, name)
        if value is not None and value.startswith("s3://"):
            yield ConfigIssue(
                "it is a folder of this machine", key=name, value=value, hint="give a folder, and this as s3_path"
            )
    if saved.s3_path is None:
        return
    scheme, _, rest = saved.s3_path.partition("://")
    if scheme != "s3" or not rest.partition("/")[0]:
        yield ConfigIssue("it is no address in S3", key="s3_path", value=saved.s3_path, hint="write s3://bucket/folder")
    if saved.save is None and saved.load is None:
        yield ConfigIssue(
            "there is nothing to copy", key="s3_path", value=saved.s3_path, hint="give save or load, a folder"
        )
    if saved.s3_chunk_size < _MIN_PART_SIZE:
        yield ConfigIssue(
            f"S3 takes parts of {_MIN_PART_SIZE} bytes at least", key="s3_chunk_size", value=saved.s3_chunk_size
        )


def recomputation_is_one_thing(config: Config) -> Iterator[ConfigIssue]:
    """Recomputation is of blocks or of the attention core, not both."""
    recompute = config.recompute
    if recompute.recompute_granularity == "selective" and recompute.checkpoint_activations:
        yield ConfigIssue(
            "checkpoint_activations recomputes blocks",
            key="recompute_granularity",
            value="selective",
            hint="leave one of the two out",
        )


def snapshots_need_a_gpu(config: Config) -> Iterator[ConfigIssue]:
    """Memory snapshots need a GPU; profile_step_stop is after profile_step_start."""
    observe = config.observe
    if observe.memory_profiling and config.launch.distributed_backend == "gloo":
        yield ConfigIssue(
            "a memory snapshot is one of the GPU's allocator, and this run is on CPUs",
            key="memory_profiling",
            value=True,
            hint="leave it out; runtime/peak_memory_bytes is the peak here",
        )
    if (observe.profile or observe.memory_profiling) and not 0 < observe.profile_step_start < observe.profile_step_stop:
        yield ConfigIssue(
            f"there is no step from {observe.profile_step_start} up to before {observe.profile_step_stop}",
            key="profile_step_stop",
            value=observe.profile_step_stop,
            hint="make it greater than profile_step_start, which counts from 1",
        )


def measurements_make_sense(config: Config) -> Iterator[ConfigIssue]:
    """The gradient noise scale needs several batches; loss_spike_factor is above 1."""
    observe = config.observe
    if observe.log_gradient_noise_scale and observe.gradient_noise_scale_n_batches < 2:
        yield ConfigIssue(
            "a mean of one batch is that batch",
            key="gradient_noise_scale_n_batches",
            value=observe.gradient_noise_scale_n_batches,
            hint="use 2 or more",
        )
    if observe.loss_spike_factor is not None and observe.loss_spike_factor <= 1:
        yield ConfigIssue("it must be above 1", key="loss_spike_factor", value=observe.loss_spike_factor)
