"""Keys that matter only where another key asks for what they describe: set elsewhere, they get a warning line.

Each entry names keys, the condition under which they are read to any effect, and why they are not otherwise. What no
configuration reads is in `unsupported.py` (HINTS, DEAD); what contradicts another key is a rule's error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from megatron.block_sparsity import SPARSE_KINDS
from megatron.config.config import Config
from megatron.config.defaults.fill_defaults import trains
from megatron.registry import NORMS, POSITIONS, SCHEDULES, TOKENIZERS


@dataclass(frozen=True)
class Dependent:
    """Keys, the condition under which they have an effect, and the reason why they have none otherwise."""

    keys: tuple[str, ...]
    matter: Callable[[Config], bool]
    otherwise: str


def _attends_by(config: Config, *kinds: str) -> bool:
    """Whether some block is of one of the kinds, or nobody knows yet."""
    pattern = set(map(str, config.model.attention_config or ()))
    return not pattern or bool(pattern & set(kinds))


def _has_epsilon(key: str, config: Config) -> bool:
    return NORMS.entry(config.model.norm).epsilon == key


def _has_positions(key: str, config: Config) -> bool:
    return key in POSITIONS.entry(config.model.pos_emb).settings


def _has_schedule(key: str, config: Config) -> bool:
    return key in SCHEDULES.entry(config.schedule.lr_decay_style).settings


def _has_file(key: str, config: Config) -> bool:
    return key in TOKENIZERS.entry(config.tokenizer.tokenizer_type).files


def _recomputes_blocks(config: Config) -> bool:
    section = config.recompute
    return section.recompute_granularity != "selective" and (
        section.checkpoint_activations or section.recompute_granularity == "full"
    )


def _loads(config: Config) -> bool:
    return config.checkpoint.load is not None


def _resumes(config: Config) -> bool:
    return _loads(config) and not config.checkpoint.finetune


def _saves(config: Config) -> bool:
    return config.checkpoint.save is not None or not trains(config.launch.user_script)


def _names_sets(split: str) -> Callable[[Config], bool]:
    return lambda config: getattr(config.data, f"{split}_data_paths") is not None


def _has_experts(config: Config) -> bool:
    return config.moe.moe_num_experts > 1


def _objective(name: str) -> Callable[[Config], bool]:
    return lambda config: config.training.train_impl == name


def _samples(config: Config) -> bool:
    return config.generation.temperature > 0


PLAIN_NORMAL = frozenset({"normal", "scaled_normal", "single_residual_scaled_normal"})

DEPENDENT: tuple[Dependent, ...] = (
    Dependent(("sparsity_config",), lambda config: _attends_by(config, *SPARSE_KINDS), "no block is of a sparse kind"),
    Dependent(
        ("sliding_window_width",),
        lambda config: _attends_by(config, "global", "flash"),
        "it is for blocks of kind global and flash",
    ),
    Dependent(("gpt_j_tied",), lambda config: config.model.gpt_j_residual, "gpt_j_residual is off"),
    *(
        Dependent((epsilon,), partial(_has_epsilon, epsilon), "the norm is another one")
        for epsilon in ("layernorm_epsilon", "rms_norm_epsilon", "scalenorm_epsilon")
    ),
    *(
        Dependent(keys, partial(_has_positions, keys[0]), f"pos_emb is not {name}")
        for name, keys in (
            ("rotary", ("rotary_pct", "rotary_emb_base")),
            ("rpe", ("rpe_num_buckets", "rpe_max_distance")),
        )
    ),
    Dependent(
        ("init_method_std",),
        lambda config: bool(
            PLAIN_NORMAL & {config.initialization.init_method, config.initialization.output_layer_init_method}
        ),
        "the initialisations find their own deviation",
    ),
    Dependent(
        ("mamba_use_bias_in_conv", "mamba_use_bias_in_linears"),
        lambda config: _attends_by(config, "mamba"),
        "no block is of kind mamba",
    ),
    Dependent(("gmlp_attn_dim",), lambda config: _attends_by(config, "amlp"), "no block is of kind amlp"),
    Dependent(
        ("dim_att", "head_size", "ffn_dim"), lambda config: _attends_by(config, "rwkv"), "no block is of kind rwkv"
    ),
    Dependent(
        (
            "moe_expert_interval",
            "moe_top_k",
            "moe_normalize_top_k",
            "moe_router_type",
            "moe_jitter_eps",
            "moe_aux_loss_coeff",
            "moe_z_loss_coeff",
            "moe_capacity_factor",
            "moe_eval_capacity_factor",
        ),
        _has_experts,
        "moe_num_experts is 1",
    ),
    Dependent(
        ("moe_min_capacity",),
        lambda config: (
            _has_experts(config)
            and (config.moe.moe_capacity_factor is not None or config.moe.moe_eval_capacity_factor is not None)
        ),
        "no capacity is given (moe_capacity_factor)",
    ),
    Dependent(
        ("pipe_partition_method",),
        lambda config: config.parallelism.pipe_parallel_size > 1,
        "there is one pipeline stage",
    ),
    Dependent(
        (
            "checkpoint_num_layers",
            "recompute_method",
            "partition_activations",
            "checkpoint_in_cpu",
            "contiguous_checkpointing",
            "synchronize_each_layer",
            "profile_backward",
        ),
        _recomputes_blocks,
        "no block is recomputed (checkpoint_activations or recompute_granularity: full)",
    ),
    Dependent(
        ("warmup",), lambda config: config.schedule.warmup_iters is None, "warmup_iters gives the length of the warmup"
    ),
    Dependent(
        ("wsd_decay_fraction", "wsd_decay_style"),
        partial(_has_schedule, "wsd_decay_style"),
        "lr_decay_style is not wsd",
    ),
    Dependent(("min_lr",), partial(_has_schedule, "min_lr"), "lr_decay_style is constant"),
    Dependent(
        ("override_lr_scheduler", "use_checkpoint_lr_scheduler", "override_data_order", "no_load_optim", "no_load_rng"),
        _resumes,
        "no run is resumed (load, without finetune)",
    ),
    Dependent(("load_fallback",), _loads, "nothing is loaded (load)"),
    Dependent(
        (
            "checkpoint_factor",
            "checkpoint_scale",
            "checkpoint_async",
            "extra_save_iters",
            "keep_last_n_checkpoints",
            "no_save_optim",
            "no_save_rng",
            "save_overwrite",
        ),
        _saves,
        "nothing is saved (save)",
    ),
    Dependent(
        ("checkpoint_validation_with_forward_pass",),
        lambda config: _saves(config) or _loads(config),
        "nothing is saved or loaded",
    ),
    Dependent(("s3_chunk_size",), lambda config: config.checkpoint.s3_path is not None, "there is no s3_path"),
    Dependent(("train_data_weights",), _names_sets("train"), "train_data_paths names the sets that have weights"),
    Dependent(("valid_data_weights",), _names_sets("valid"), "valid_data_paths names the sets that have weights"),
    Dependent(("test_data_weights",), _names_sets("test"), "test_data_paths names the sets that have weights"),
    *(
        Dependent(
            (f"{split}_label_data_paths", f"{split}_reward_data_paths"),
            _names_sets(split),
            f"{split}_data_paths names no sets that they belong to",
        )
        for split in ("valid", "test")
    ),
    Dependent(
        ("valid_loss_per_set",),
        lambda config: len(config.data.valid_data_paths or ()) > 1,
        "valid_data_paths does not name several sets",
    ),
    Dependent(
        ("weight_by_num_documents",),
        lambda config: any(_names_sets(split)(config) for split in ("train", "valid", "test")),
        "there are no sets to weigh (train_data_paths)",
    ),
    Dependent(
        ("weighted_sampler_alpha",),
        lambda config: config.data.weight_by_num_documents,
        "weight_by_num_documents is off",
    ),
    Dependent(("split",), lambda config: config.data.data_path is not None, "it cuts data_path, which is not given"),
    Dependent(("allow_chopped",), lambda config: config.data.pack_impl != "packed", "pack_impl: packed cuts documents"),
    Dependent(
        ("overflow_limit",),
        lambda config: config.precision.precision == "fp16" or config.training.on_nan == "skip",
        "no step is left out (precision: fp16, on_nan: skip)",
    ),
    Dependent(
        ("te_fp8_format", "te_fp8_wgrad", "te_fp8_amax_history_len", "te_fp8_amax_compute_algo", "te_fp8_margin"),
        lambda config: config.transformer_engine.te_fp8_mha,
        "te_fp8_mha is off",
    ),
    Dependent(
        ("mup_width_scale",),
        lambda config: config.mup.coord_check,
        "only coord_check reads it; which dimensions grow is known of every tensor",
    ),
    Dependent(
        ("wandb_group", "wandb_run_name", "wandb_team", "wandb_project", "wandb_host", "wandb_init_all_ranks"),
        lambda config: config.observe.use_wandb is not False,
        "use_wandb is off",
    ),
    Dependent(
        ("comet_workspace", "comet_project", "comet_experiment_name", "comet_tags", "comet_others"),
        lambda config: bool(config.observe.use_comet),
        "use_comet is off",
    ),
    Dependent(
        ("log_norms_by",),
        lambda config: (
            config.observe.log_grad_norm or config.observe.log_param_norm or config.observe.log_grad_pct_zeros
        ),
        "no norms are logged (log_grad_norm, log_grad_pct_zeros, log_param_norm)",
    ),
    Dependent(
        ("gradient_noise_scale_n_batches", "gradient_noise_scale_cpu_offload"),
        lambda config: config.observe.log_gradient_noise_scale,
        "log_gradient_noise_scale is off",
    ),
    Dependent(
        ("profile_step_start", "profile_step_stop"),
        lambda config: config.observe.profile or config.observe.memory_profiling,
        "neither profile nor memory_profiling is on",
    ),
    Dependent(("memory_profiling_path",), lambda config: config.observe.memory_profiling, "memory_profiling is off"),
    Dependent(
        ("merge_file",),
        partial(_has_file, "merge_file"),
        "only GPT2BPETokenizer reads merges beside its vocabulary",
    ),
    Dependent(
        ("vocab_file",),
        partial(_has_file, "vocab_file"),
        "CharLevelTokenizer takes bytes and no file",
    ),
    Dependent(
        ("mamba_selective_scan_fusion", "mamba_causal_conv_fusion", "mamba_inner_func_fusion"),
        lambda config: _attends_by(config, "mamba"),
        "no block is of kind mamba",
    ),
    Dependent(("dpo_beta", "dpo_fp32", "dpo_reference_free"), _objective("dpo"), "train_impl is not dpo"),
    Dependent(
        ("kto_beta", "kto_desirable_weight", "kto_fp32", "kto_undesirable_weight"),
        _objective("kto"),
        "train_impl is not kto",
    ),
    Dependent(
        ("fp32_reinforce", "kl_div_beta", "kl_impl", "reinforce_leave_one_out"),
        _objective("reinforce"),
        "train_impl is not reinforce",
    ),
    Dependent(("z_loss",), _objective("rm"), "train_impl is not rm"),
    Dependent(
        ("online_dataserver_ips", "online_dataserver_ports"),
        lambda config: config.data.dataset_impl == "online",
        "dataset_impl is not online",
    ),
    Dependent(("top_k", "top_p", "min_p"), _samples, "temperature 0 takes the likeliest token"),
)


def dependent_without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """Keys of the table that have no effect here, with the reason."""
    for entry in DEPENDENT:
        if not entry.matter(config):
            yield from ((key, entry.otherwise) for key in entry.keys)


def saves_that_never_come(config: Config) -> list[int]:
    """Iterations of extra_save_iters that the run does not reach [steps]."""
    last = config.training.train_iters
    wanted = config.checkpoint.extra_save_iters or ()
    return [number for number in wanted if number < 0 or (last is not None and number > last)]


def profile_never_starts(config: Config) -> bool:
    """Whether the steps to be profiled are behind the end of the run."""
    observe, last = config.observe, config.training.train_iters
    return (observe.profile or observe.memory_profiling) and last is not None and observe.profile_step_start > last
