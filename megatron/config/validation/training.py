"""Rules about numbers, precision, the schedule, saving and the length of a run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.defaults.fill_defaults import trains
from megatron.errors import ConfigIssue

MOST_MEMORY = 1_000_000  # GiB


def deepspeed_is_on(config: Config) -> Iterator[ConfigIssue]:
    """There is no other engine."""
    if not config.deepspeed.deepspeed:
        yield ConfigIssue(
            "training always runs through DeepSpeed", key="deepspeed", value=False, hint="leave the key out"
        )


def fractions_are_fractions(config: Config) -> Iterator[ConfigIssue]:
    """Probabilities and shares are in [0, 1]."""
    sections = (config.model, config.schedule, config.generation)
    names = ("hidden_dropout", "attention_dropout", "lr_decay_fraction", "wsd_decay_fraction", "top_p", "min_p")
    for section in sections:
        for name in names:
            value = getattr(section, name, None)
            if value is not None and not 0 <= value <= 1:
                yield ConfigIssue("it must lie between 0 and 1", key=name, value=value)


def counts_are_positive(config: Config) -> Iterator[ConfigIssue]:
    """Sizes and counts for which zero or less means nothing."""
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


def ends_are_tokens(config: Config) -> Iterator[ConfigIssue]:
    """An id is at least 0; the tokenizer, once it is there, tells how large it may be."""
    ids = config.generation.eos_token_ids
    if ids is not None and any(number < 0 for number in ids):
        yield ConfigIssue("a token's id cannot be negative", key="eos_token_ids", value=list(ids))


def ports_are_ports(config: Config) -> Iterator[ConfigIssue]:
    """A port has 16 bits, and 0 is none."""
    for section, name in ((config.launch, "master_port"), (config.generation, "serve_port")):
        port = getattr(section, name)
        if not 0 < port < 1 << 16:
            yield ConfigIssue("a port lies between 1 and 65535", key=name, value=port)


def hosts_are_counted(config: Config) -> Iterator[ConfigIssue]:
    """-1 stands for all hosts, or for all accelerators of a host; 0 for none."""
    for name in ("num_nodes", "num_gpus"):
        count = getattr(config.launch, name)
        if count is not None and (count == 0 or count < -1):
            yield ConfigIssue("it must be more than 0, or -1 for all", key=name, value=count)


def one_launcher_is_named(config: Config) -> Iterator[ConfigIssue]:
    """deepspeed_slurm and deepspeed_mpi name a launcher as well."""
    launch = config.launch
    if launch.deepspeed_slurm and launch.launcher not in {"pdsh", "slurm"}:
        what = f"launcher = {launch.launcher} asks for another one"
        yield ConfigIssue(what, key="deepspeed_slurm", value=True, hint="leave one of the two out")
    if launch.deepspeed_mpi and launch.launcher not in {"pdsh", "openmpi", "mpich", "impi", "mvapich"}:
        what = f"launcher = {launch.launcher} asks for another one"
        yield ConfigIssue(what, key="deepspeed_mpi", value=True, hint="leave one of the two out")
    if launch.deepspeed_mpi and launch.deepspeed_slurm:
        yield ConfigIssue("deepspeed_slurm asks for srun", key="deepspeed_mpi", value=True, hint="keep one of the two")
    if launch.launcher == "local" and launch.force_multi:
        what = "launcher = local starts nothing elsewhere"
        yield ConfigIssue(what, key="force_multi", value=True, hint="leave one of the two out")


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
    """`save` says where; checkpoint_factor or extra_save_iters say when."""
    saving = config.checkpoint
    factor = saving.checkpoint_factor
    if (
        trains(config.launch.user_script)
        and saving.save is not None
        and factor is None
        and saving.extra_save_iters is None
    ):
        yield ConfigIssue(
            "nothing says when to save",
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
    """`finetune` and `iteration` speak of a checkpoint, which `load` names."""
    saved = config.checkpoint
    for key, asked in (("finetune", saved.finetune), ("iteration", saved.iteration is not None)):
        if saved.load is None and asked:
            hint = "give load, the folder of the checkpoint"
            yield ConfigIssue("nothing is loaded", key=key, value=getattr(saved, key), hint=hint)


_LEAST_PART = 5 << 20  # bytes; S3 takes no smaller one


def buckets_are_addresses(config: Config) -> Iterator[ConfigIssue]:
    """`s3_path` is s3://bucket/folder and copies what `save` or `load` name, which are folders."""
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
    if saved.s3_chunk_size < _LEAST_PART:
        yield ConfigIssue(
            f"S3 takes parts of {_LEAST_PART} bytes at least", key="s3_chunk_size", value=saved.s3_chunk_size
        )


def recomputation_is_one_thing(config: Config) -> Iterator[ConfigIssue]:
    """Whole blocks or their attention core, not both."""
    again = config.recompute
    if again.recompute_granularity == "selective" and again.checkpoint_activations:
        yield ConfigIssue(
            "checkpoint_activations asks for whole blocks",
            key="recompute_granularity",
            value="selective",
            hint="leave one of the two out",
        )


def snapshots_need_a_gpu(config: Config) -> Iterator[ConfigIssue]:
    """Memory snapshots are those of the GPU's allocator; the steps to look at follow one another."""
    observe = config.observe
    if observe.memory_profiling and config.launch.distributed_backend == "gloo":
        yield ConfigIssue(
            "a memory snapshot is one of the GPU's allocator, and this run is on CPUs",
            key="memory_profiling",
            value=True,
            hint="leave it out; runtime/peak_memory_bytes tells the peak here",
        )
    if (observe.profile or observe.memory_profiling) and not 0 < observe.profile_step_start < observe.profile_step_stop:
        yield ConfigIssue(
            f"there is no step from {observe.profile_step_start} up to before {observe.profile_step_stop}",
            key="profile_step_stop",
            value=observe.profile_step_stop,
            hint="make it greater than profile_step_start, which counts from 1",
        )


def noise_needs_several_batches(config: Config) -> Iterator[ConfigIssue]:
    """The noise scale compares single batches with the mean of several."""
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
