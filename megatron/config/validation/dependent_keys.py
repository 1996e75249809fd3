"""Keys that have an effect only with certain values of other keys; otherwise they are reported as a warning.

Keys without effect in any configuration are in `unsupported.py` (IGNORED_HINTS, UNUSED_KEYS); keys that contradict
each other are errors of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from megatron.block_sparsity import SPARSE_KINDS
from megatron.config.config import Config
from megatron.config.derived.fill import trains
from megatron.config.validation.dependent_mixer_keys import OF_MIXERS, has_kind
from megatron.config.validation.dependent_model_keys import OF_PARTS, DependentKeys
from megatron.config.validation.retrieval import OF_RETRIEVAL
from megatron.config.validation.retro import OF_RETRO
from megatron.config.validation.task import OF_TASKS
from megatron.registry import GATED_DELTA_NET, NORMS, OPTIMIZERS, POSITIONS, SCHEDULES, TOKENIZERS, WITHOUT_ATTENTION
from megatron.registry.kernels import FUSED_ADAM


def _attends(config: Config) -> bool:
    """Returns whether some block has attention, or the kinds are not known yet."""
    pattern = set(map(str, config.model.attention_config or ()))
    return not pattern or not pattern <= WITHOUT_ATTENTION


def _has_epsilon(key: str, config: Config) -> bool:
    own = key == "rms_norm_epsilon" and {"mamba2", GATED_DELTA_NET} & set(map(str, config.model.attention_config or ()))
    return bool(own) or NORMS.entry(config.model.norm).epsilon == key


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


def _objective(*names: str) -> Callable[[Config], bool]:
    return lambda config: config.training.train_impl in names


def _has_full_adam(config: Config) -> bool:
    return OPTIMIZERS.entry(config.optimizer.optimizer_type).kernel == FUSED_ADAM


def _samples(config: Config) -> bool:
    return config.generation.temperature > 0


PLAIN_NORMAL = frozenset({"normal", "scaled_normal", "single_residual_scaled_normal"})

DEPENDENT: tuple[DependentKeys, ...] = (
    *OF_PARTS,
    *OF_MIXERS,
    DependentKeys(("sparsity_config",), lambda config: has_kind(config, *SPARSE_KINDS), "no block is of a sparse kind"),
    DependentKeys(
        ("sliding_window_width",),
        lambda config: has_kind(config, "global", "flash", "attention"),
        "it is for blocks of kind global and flash",
    ),
    DependentKeys(("use_apex_adam",), _has_full_adam, "the optimizer is not adam"),
    DependentKeys(
        (
            *("add_qkv_bias", "softmax_scale", "softmax_type", "attn_logit_softcapping", "layer_types"),
            "attention_output_gate",
        ),
        _attends,
        "no block has attention",
    ),
    *(
        DependentKeys((epsilon,), partial(_has_epsilon, epsilon), "the norm is another one")
        for epsilon in ("layernorm_epsilon", "rms_norm_epsilon", "scalenorm_epsilon")
    ),
    *(
        DependentKeys(keys, partial(_has_positions, keys[0]), f"pos_emb is not {name}")
        for name, keys in (
            ("rotary", ("rotary_pct", "rotary_emb_base")),
            ("rpe", ("rpe_num_buckets", "rpe_max_distance")),
        )
    ),
    DependentKeys(
        ("init_method_std",),
        lambda config: bool(
            PLAIN_NORMAL & {config.initialization.init_method, config.initialization.output_layer_init_method}
        ),
        "the initialisations compute their own standard deviation",
    ),
    DependentKeys(
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
            "moe_first_k_dense_replace",
            "moe_layer_freq",
            "moe_ffn_hidden_size",
            "moe_use_bias_in_experts",
            "moe_use_bias_in_router",
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
            "moe_router_score_function",
            "moe_router_pre_softmax",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_topk_scaling_factor",
            "moe_router_enable_expert_bias",
            "moe_seq_aux_loss_coeff",
            "moe_global_aux_loss_coeff",
        ),
        _has_experts,
        "moe_num_experts is 1",
    ),
    DependentKeys(
        ("moe_min_capacity",),
        lambda config: (
            _has_experts(config)
            and (config.moe.moe_capacity_factor is not None or config.moe.moe_eval_capacity_factor is not None)
        ),
        "no capacity is given (moe_capacity_factor)",
    ),
    DependentKeys(
        ("moe_router_bias_update_rate",),
        lambda config: _has_experts(config) and config.moe.moe_router_enable_expert_bias,
        "the router has no bias (moe_router_enable_expert_bias)",
    ),
    DependentKeys(
        ("moe_router_group_experts",),
        lambda config: _has_experts(config) and (config.moe.moe_router_num_groups or 1) > 1,
        "the experts are one group (moe_router_num_groups)",
    ),
    DependentKeys(
        ("num_layers_per_virtual_pipeline_stage",),
        lambda config: config.parallelism.pipe_parallel_size > 1 and config.parallelism.pipe_schedule == "interleaved",
        "a rank has one stage, or two (pipe_schedule is not interleaved)",
    ),
    DependentKeys(
        ("pipe_partition_method", "pipe_schedule"),
        lambda config: config.parallelism.pipe_parallel_size > 1,
        "there is one pipeline stage",
    ),
    DependentKeys(
        ("context_parallel_method",),
        lambda config: config.parallelism.context_parallel_size > 1,
        "no ranks share a sequence (context_parallel_size is 1)",
    ),
    DependentKeys(
        (
            *("checkpoint_num_layers", "recompute_method", "partition_activations", "checkpoint_in_cpu"),
            *("contiguous_checkpointing", "synchronize_each_layer", "profile_backward"),
        ),
        _recomputes_blocks,
        "no block is recomputed (checkpoint_activations or recompute_granularity: full)",
    ),
    DependentKeys(
        ("warmup",), lambda config: config.schedule.warmup_iters is None, "warmup_iters gives the length of the warmup"
    ),
    DependentKeys(
        ("wsd_decay_fraction", "wsd_decay_style"),
        partial(_has_schedule, "wsd_decay_style"),
        "lr_decay_style is neither wsd nor power",
    ),
    DependentKeys(
        ("infinite_constant_lr", "infinite_cooldown_fraction", "infinite_anneal_fraction"),
        partial(_has_schedule, "infinite_constant_lr"),
        "lr_decay_style is neither infinite_cosine nor infinite_inv_sqrt",
    ),
    DependentKeys(
        ("power_amplitude", "power_exponent"),
        partial(_has_schedule, "power_amplitude"),
        "lr_decay_style is not power",
    ),
    DependentKeys(("min_lr",), partial(_has_schedule, "min_lr"), "lr_decay_style is constant"),
    DependentKeys(
        ("override_lr_scheduler", "use_checkpoint_lr_scheduler", "override_data_order", "no_load_optim", "no_load_rng"),
        _resumes,
        "no run is resumed (load, without finetune)",
    ),
    DependentKeys(("load_fallback",), _loads, "nothing is loaded (load)"),
    DependentKeys(
        (
            *("checkpoint_factor", "checkpoint_scale", "checkpoint_async", "extra_save_iters"),
            *("keep_last_n_checkpoints", "no_save_optim", "no_save_rng", "save_overwrite"),
        ),
        _saves,
        "nothing is saved (save)",
    ),
    DependentKeys(
        ("checkpoint_validation_with_forward_pass",),
        lambda config: _saves(config) or _loads(config),
        "nothing is saved or loaded",
    ),
    DependentKeys(("s3_chunk_size",), lambda config: config.checkpoint.s3_path is not None, "there is no s3_path"),
    DependentKeys(("train_data_weights",), _names_sets("train"), "train_data_paths names the sets that have weights"),
    DependentKeys(("valid_data_weights",), _names_sets("valid"), "valid_data_paths names the sets that have weights"),
    DependentKeys(("test_data_weights",), _names_sets("test"), "test_data_paths names the sets that have weights"),
    *(
        DependentKeys(
            (f"{split}_label_data_paths", f"{split}_reward_data_paths"),
            _names_sets(split),
            f"{split}_data_paths names no sets that they belong to",
        )
        for split in ("valid", "test")
    ),
    DependentKeys(
        ("valid_loss_per_set",),
        lambda config: len(config.data.valid_data_paths or ()) > 1,
        "valid_data_paths does not name several sets",
    ),
    DependentKeys(
        ("weight_by_num_documents",),
        lambda config: any(_names_sets(split)(config) for split in ("train", "valid", "test")),
        "there are no sets to weigh (train_data_paths)",
    ),
    DependentKeys(
        ("weighted_sampler_alpha",),
        lambda config: config.data.weight_by_num_documents,
        "weight_by_num_documents is off",
    ),
    DependentKeys(
        ("split",), lambda config: config.data.data_path is not None, "it cuts data_path, which is not given"
    ),
    DependentKeys(
        ("allow_chopped",), lambda config: config.data.pack_impl != "packed", "pack_impl: packed cuts documents"
    ),
    DependentKeys(
        ("outlier_window",),
        lambda config: config.training.skip_outlier_steps is not None,
        "skip_outlier_steps is not given",
    ),
    DependentKeys(("save_hf_every",), lambda config: config.checkpoint.save is not None, "save is not given"),
    DependentKeys(
        ("overflow_limit",),
        lambda config: config.precision.precision == "fp16" or config.training.on_nan == "skip",
        "no step is left out (precision: fp16, on_nan: skip)",
    ),
    DependentKeys(
        ("te_fp8_format", "te_fp8_wgrad", "te_fp8_amax_history_len", "te_fp8_amax_compute_algo", "te_fp8_margin"),
        lambda config: config.transformer_engine.te_fp8_mha,
        "te_fp8_mha is off",
    ),
    DependentKeys(
        ("mup_width_scale",),
        lambda config: config.mup.coord_check,
        "only coord_check reads it; which dimensions grow is known of every tensor",
    ),
    DependentKeys(
        ("wandb_group", "wandb_run_name", "wandb_team", "wandb_project", "wandb_host", "wandb_init_all_ranks"),
        lambda config: config.observe.use_wandb is not False,
        "use_wandb is off",
    ),
    DependentKeys(
        ("comet_workspace", "comet_project", "comet_experiment_name", "comet_tags", "comet_others"),
        lambda config: bool(config.observe.use_comet),
        "use_comet is off",
    ),
    DependentKeys(
        ("log_norms_by",),
        lambda config: (
            config.observe.log_grad_norm or config.observe.log_param_norm or config.observe.log_grad_pct_zeros
        ),
        "no norms are logged (log_grad_norm, log_grad_pct_zeros, log_param_norm)",
    ),
    DependentKeys(
        ("gradient_noise_scale_n_batches", "gradient_noise_scale_cpu_offload"),
        lambda config: config.observe.log_gradient_noise_scale,
        "log_gradient_noise_scale is off",
    ),
    DependentKeys(
        ("profile_step_start", "profile_step_stop"),
        lambda config: config.observe.profile or config.observe.memory_profiling,
        "neither profile nor memory_profiling is on",
    ),
    DependentKeys(
        ("memory_profiling_path",), lambda config: config.observe.memory_profiling, "memory_profiling is off"
    ),
    DependentKeys(
        ("merge_file",),
        partial(_has_file, "merge_file"),
        "only GPT2BPETokenizer reads merges beside its vocabulary",
    ),
    DependentKeys(
        ("vocab_file",),
        partial(_has_file, "vocab_file"),
        "CharLevelTokenizer takes bytes and no file",
    ),
    DependentKeys(
        ("scaled_upper_triang_masked_softmax_fusion", "scaled_masked_softmax_fusion"),
        lambda config: has_kind(config, "global", "attention"),
        "no block is of kind global",
    ),
    DependentKeys(("dpo_beta", "dpo_fp32", "dpo_reference_free"), _objective("dpo"), "train_impl is not dpo"),
    DependentKeys(
        ("kto_beta", "kto_desirable_weight", "kto_fp32", "kto_undesirable_weight"),
        _objective("kto"),
        "train_impl is not kto",
    ),
    DependentKeys(
        ("fp32_reinforce", "kl_div_beta", "kl_impl", "reinforce_leave_one_out"),
        _objective("reinforce"),
        "train_impl is not reinforce",
    ),
    DependentKeys(("mask_prob", "mask_max_ngram", "short_seq_prob"), _objective("bert", "t5"), "nothing is masked"),
    DependentKeys(("mask_mean_words",), _objective("t5"), "train_impl is not t5"),
    *OF_TASKS,
    *OF_RETRIEVAL,
    *OF_RETRO,
    DependentKeys(("z_loss",), _objective("rm"), "train_impl is not rm"),
    DependentKeys(
        ("online_dataserver_ips", "online_dataserver_ports"),
        lambda config: config.data.dataset_impl == "online",
        "dataset_impl is not online",
    ),
    DependentKeys(("top_k", "top_p", "min_p"), _samples, "temperature 0 takes the likeliest token"),
)


def dependent_without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the keys of the table without effect in this configuration, with the reason."""
    for entry in DEPENDENT:
        if not entry.condition(config):
            yield from ((key, entry.reason) for key in entry.keys)


def unreachable_saves(config: Config) -> list[int]:
    """Returns the iterations of extra_save_iters that the run does not reach [steps]."""
    last, requested = config.training.train_iters, config.checkpoint.extra_save_iters or ()
    return [number for number in requested if number < 0 or (last is not None and number > last)]


def profile_never_starts(config: Config) -> bool:
    """Returns whether the profiled steps are after the end of the run."""
    observe, last = config.observe, config.training.train_iters
    return (observe.profile or observe.memory_profiling) and last is not None and observe.profile_step_start > last
