"""Every key is accounted for: it has an effect in every training, or where another key asks for it, or gets a line."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import FIELDS, Resources, resolve
from megatron.config.derived.draft import DERIVED_ONLY
from megatron.config.validation.dependent_keys import DEPENDENT
from megatron.config.validation.unsupported import GAPS, IGNORED_HINTS, UNUSED_KEYS
from megatron.registry.attention import SOFTMAX_KEYS
from tests.config.retrieval import WHERE_RETRIEVAL_MATTERS
from tests.config.retro import WHERE_RETRO_MATTERS
from tests.config.small import SMALL, errors, resolved

DELTA = {"attention_config": ["gated_delta_net", "global"]}
MAMBA = {"attention_config": ["mamba", "global"]}
MAMBA2 = {"attention_config": ["mamba2", "global"], "mamba_num_groups": 1}
EXPERTS = {"moe_num_experts": 2}
TOPK = {**EXPERTS, "moe_router_type": "topk"}
RESUMED = {"load": "x"}
INFINITE = {"lr_decay_style": "infinite_cosine", "infinite_constant_lr": 5e-4, "min_lr": 1e-5}
TASK = {"train_impl": "classification", "task_train_data": ["x.jsonl"], "task_labels": ["a", "b"]}
TASK |= {"no_weight_tying": False, "pos_emb": "learned"}
SAVED = {"save": "x", "extra_save_iters": [1]}
SETS = {f"{split}_data_paths": ["a", "b"] for split in ("train", "valid", "test")}

# A value for each key that matters only beside others, and what makes it matter; None where a rule then refuses it,
# or a file is needed (tests/config/test_mup_rules.py).
WHERE_IT_MATTERS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "sparsity_config": ({"block": 8}, {"attention_config": ["local", "global"]}),
    **{key: (True, {"attention_config": ["global", "flash"]}) for key in SOFTMAX_KEYS},
    "sliding_window_width": (8, {"attention_config": ["global", "global"]}),
    "gpt_j_tied": (True, {"gpt_j_residual": True}),
    "mtp_loss_scaling_factor": (0.3, {"mtp_num_layers": 1, "pos_emb": "rotary", "pipe_parallel_size": 0}),
    "q_lora_rank": (8, {"multi_latent_attention": True, "pos_emb": "rotary"}),
    "kv_lora_rank": (8, {"multi_latent_attention": True, "pos_emb": "rotary"}),
    "qk_head_dim": (8, {"multi_latent_attention": True, "pos_emb": "rotary"}),
    "qk_pos_emb_head_dim": (8, {"multi_latent_attention": True, "pos_emb": "rotary"}),
    "v_head_dim": (8, {"multi_latent_attention": True, "pos_emb": "rotary"}),
    "qk_layernorm_across_heads": (True, {"use_qk_layernorm": True, "norm": "rmsnorm"}),
    "layer_type_options": ({"a": {}}, {"layer_types": ["a", "a"]}),
    "add_qkv_bias": (False, {"attention_config": ["global", "global"]}),
    "softmax_type": ("off-by-one", {"attention_config": ["global", "global"]}),
    "attention_output_gate": (True, {"attention_config": ["global", "global"]}),
    "activation_func_clamp_value": (7.0, {"activation": "swiglu"}),
    "glu_linear_offset": (1.0, {"activation": "swiglu"}),
    "softmax_scale": (0.1, {"attention_config": ["global", "global"]}),
    "attn_logit_softcapping": (5.0, {"attention_config": ["global", "global"]}),
    "layer_types": (["a", "a"], {"layer_type_options": {"a": {}}}),
    "layernorm_epsilon": (1e-4, {"norm": "layernorm"}),
    "rms_norm_epsilon": (1e-4, {"norm": "rmsnorm"}),
    "scalenorm_epsilon": (1e-4, {"norm": "scalenorm"}),
    "use_apex_adam": (True, {}),
    "rotary_pct": (0.5, {"pos_emb": "rotary"}),
    "rotary_emb_base": (500, {"pos_emb": "rotary"}),
    "rpe_num_buckets": (16, {"pos_emb": "rpe"}),
    "rpe_max_distance": (64, {"pos_emb": "rpe"}),
    "init_method_std": (0.1, {"init_method": "normal"}),
    "linear_num_key_heads": (8, DELTA),
    "linear_num_value_heads": (48, DELTA),
    "linear_key_head_dim": (64, DELTA),
    "linear_value_head_dim": (64, DELTA),
    "linear_conv_kernel_dim": (2, DELTA),
    "gated_delta_fusion": (True, DELTA),
    "mamba_use_bias_in_conv": (False, MAMBA),
    "mamba_use_bias_in_linears": (True, MAMBA),
    "mamba_selective_scan_fusion": (True, MAMBA),
    "mamba_causal_conv_fusion": (True, MAMBA),
    "mamba_inner_func_fusion": (True, MAMBA),
    "mamba_num_heads": (4, MAMBA2),
    "mamba_head_dim": (16, MAMBA2),
    "mamba_state_dim": (16, MAMBA2),
    "mamba_num_groups": (2, MAMBA2),
    "mamba_dt_limit": ([0.01, None], MAMBA2),
    "mamba_norm_before_gate": (True, MAMBA2),
    "gmlp_attn_dim": (32, {"attention_config": ["amlp", "global"]}),
    "dim_att": (128, {"attention_config": ["rwkv", "global"]}),
    "head_size": (16, {"attention_config": ["rwkv", "global"]}),
    "ffn_dim": (128, {"attention_config": ["rwkv", "global"]}),
    "moe_expert_interval": (2, EXPERTS),
    "moe_top_k": (2, EXPERTS),
    "moe_normalize_top_k": (True, {**EXPERTS, "moe_top_k": 2}),
    "moe_router_type": ("topk", EXPERTS),
    "moe_jitter_eps": (0.1, EXPERTS),
    "moe_aux_loss_coeff": (0.1, EXPERTS),
    "moe_z_loss_coeff": (0.1, EXPERTS),
    "moe_capacity_factor": (1.5, EXPERTS),
    "moe_eval_capacity_factor": (1.5, EXPERTS),
    "moe_min_capacity": (8, {**EXPERTS, "moe_capacity_factor": 1.5}),
    "moe_first_k_dense_replace": (1, EXPERTS),
    "moe_layer_freq": ([0, 1], EXPERTS),
    "moe_ffn_hidden_size": (64, EXPERTS),
    "moe_use_bias_in_experts": (True, EXPERTS),
    "moe_use_bias_in_router": (True, EXPERTS),
    "moe_shared_expert_intermediate_size": (64, EXPERTS),
    "moe_shared_expert_gate": (True, {**EXPERTS, "moe_shared_expert_intermediate_size": 64}),
    "moe_router_score_function": ("sigmoid", TOPK),
    "moe_router_pre_softmax": (False, {**TOPK, "moe_top_k": 2}),
    "moe_router_num_groups": (2, {**TOPK, "moe_router_group_topk": 1, "moe_router_group_experts": 1}),
    "moe_router_group_topk": (1, {**TOPK, "moe_router_num_groups": 2, "moe_router_group_experts": 1}),
    "moe_router_group_experts": (1, {**TOPK, "moe_router_num_groups": 2, "moe_router_group_topk": 1}),
    "moe_router_topk_scaling_factor": (2.5, TOPK),
    "moe_router_enable_expert_bias": (True, TOPK),
    "moe_router_bias_update_rate": (0.01, {**TOPK, "moe_router_enable_expert_bias": True}),
    "moe_seq_aux_loss_coeff": (0.1, EXPERTS),
    "moe_global_aux_loss_coeff": (0.1, EXPERTS),
    "pipe_partition_method": ("uniform", {"pipe_parallel_size": 2}),
    "context_parallel_method": ("ring", {"context_parallel_size": 2}),
    "pipe_schedule": ("interleaved", {"pipe_parallel_size": 2, "num_layers": 4}),
    "num_layers_per_virtual_pipeline_stage": (
        1,
        {"pipe_parallel_size": 2, "num_layers": 4, "pipe_schedule": "interleaved"},
    ),
    "checkpoint_num_layers": (2, {"checkpoint_activations": True}),
    "recompute_method": ("block", {"recompute_granularity": "full"}),
    "partition_activations": (True, {"checkpoint_activations": True}),
    "checkpoint_in_cpu": (True, {"checkpoint_activations": True}),
    "contiguous_checkpointing": (True, {"checkpoint_activations": True, "partition_activations": True}),
    "synchronize_each_layer": (True, {"checkpoint_activations": True}),
    "profile_backward": (True, {"checkpoint_activations": True}),
    "warmup": (0.1, {}),
    "wsd_decay_fraction": (0.2, {"lr_decay_style": "wsd"}),
    "wsd_decay_style": ("sqrt", {"lr_decay_style": "wsd"}),
    "infinite_constant_lr": (1e-4, INFINITE),
    "infinite_cooldown_fraction": (0.3, INFINITE),
    "infinite_anneal_fraction": (0.2, INFINITE),
    "power_amplitude": (3.0, {"lr_decay_style": "power"}),
    "power_exponent": (-0.4, {"lr_decay_style": "power"}),
    "min_lr": (1e-5, {"lr_decay_style": "cosine"}),
    "override_lr_scheduler": (True, RESUMED),
    "use_checkpoint_lr_scheduler": (True, RESUMED),
    "override_data_order": (True, RESUMED),
    "no_load_optim": (True, RESUMED),
    "no_load_rng": (True, RESUMED),
    "load_fallback": ("previous", RESUMED),
    "checkpoint_factor": (10, SAVED),
    "checkpoint_scale": ("log", {**SAVED, "checkpoint_factor": 2}),
    "checkpoint_async": (True, SAVED),
    "extra_save_iters": ([2], {**SAVED, "checkpoint_factor": 10}),
    "keep_last_n_checkpoints": (2, SAVED),
    "no_save_optim": (True, SAVED),
    "no_save_rng": (True, SAVED),
    "save_overwrite": (True, SAVED),
    "checkpoint_validation_with_forward_pass": (True, SAVED),
    "s3_chunk_size": (10 << 20, {**SAVED, "s3_path": "s3://bucket/x"}),
    "train_data_weights": ([1.0, 2.0], SETS),
    "valid_data_weights": ([1.0, 2.0], SETS),
    "test_data_weights": ([1.0, 2.0], SETS),
    **{
        f"{split}_{what}_data_paths": (["x", "y"], {**SETS, "train_label_data_paths": ["x", "y"]})
        for split in ("valid", "test")
        for what in ("label", "reward")
    },
    "weight_by_num_documents": (True, SETS),
    "valid_loss_per_set": (True, SETS),
    "weighted_sampler_alpha": (0.5, {**SETS, "weight_by_num_documents": True}),
    "split": ("8,1,1", {"data_path": "a"}),
    "allow_chopped": (False, {"pack_impl": "unpacked"}),
    "overflow_limit": (10, {"precision": "fp16"}),
    "save_hf_every": (2, {"save": "checkpoints", "checkpoint_factor": 1}),
    "outlier_window": (64, {"skip_outlier_steps": 6.0}),
    "te_fp8_format": ("e4m3", {"te_fp8_mha": True, "te_mha": True}),
    "te_fp8_wgrad": (False, None),
    "te_fp8_amax_history_len": (4, {"te_fp8_mha": True, "te_mha": True}),
    "te_fp8_amax_compute_algo": ("max", {"te_fp8_mha": True, "te_mha": True}),
    "te_fp8_margin": (1, {"te_fp8_mha": True, "te_mha": True}),
    "mup_width_scale": (4, None),
    "wandb_group": ("x", {"use_wandb": True}),
    "wandb_run_name": ("x", {"use_wandb": True}),
    "wandb_team": ("x", {"use_wandb": True}),
    "wandb_project": ("x", {"use_wandb": True}),
    "wandb_host": ("https://x", {"use_wandb": True}),
    "wandb_init_all_ranks": (True, {"use_wandb": True}),
    "comet_workspace": ("x", {"use_comet": True}),
    "comet_project": ("x", {"use_comet": True}),
    "comet_experiment_name": ("x", {"use_comet": True}),
    "comet_tags": (["x"], {"use_comet": True}),
    "comet_others": ({"x": 1}, {"use_comet": True}),
    "log_norms_by": ("layer", {"log_grad_norm": True}),
    "gradient_noise_scale_n_batches": (8, {"log_gradient_noise_scale": True}),
    "gradient_noise_scale_cpu_offload": (True, {"log_gradient_noise_scale": True}),
    "profile_step_start": (5, {"profile": True}),
    "profile_step_stop": (20, {"profile": True}),
    "memory_profiling_path": ("x", {"memory_profiling": True, "accelerator": "cuda"}),
    "merge_file": ("x", {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "y"}),
    "vocab_file": ("x", {"tokenizer_type": "HFTokenizer"}),
    "dpo_beta": (0.2, {"train_impl": "dpo"}),
    "dpo_fp32": (False, {"train_impl": "dpo"}),
    "dpo_reference_free": (True, {"train_impl": "dpo"}),
    "kto_beta": (0.2, {"train_impl": "kto"}),
    "kto_desirable_weight": (2.0, {"train_impl": "kto"}),
    "kto_fp32": (False, {"train_impl": "kto"}),
    "kto_undesirable_weight": (2.0, {"train_impl": "kto"}),
    "fp32_reinforce": (False, {"train_impl": "reinforce"}),
    "kl_div_beta": (0.2, {"train_impl": "reinforce"}),
    "kl_impl": ("abs", {"train_impl": "reinforce"}),
    "reinforce_leave_one_out": (True, {"train_impl": "reinforce"}),
    "mask_prob": (0.2, {"train_impl": "bert", "pack_impl": "unpacked"}),
    "mask_max_ngram": (1, {"train_impl": "bert", "pack_impl": "unpacked"}),
    "short_seq_prob": (0.2, {"train_impl": "bert", "pack_impl": "unpacked"}),
    "mask_mean_words": (
        3.0,
        {
            "train_impl": "t5",
            "pack_impl": "unpacked",
            "num_layers": None,
            "seq_length": None,
            "encoder_num_layers": 1,
            "decoder_num_layers": 1,
            "encoder_seq_length": 32,
            "decoder_seq_length": 16,
        },
    ),
    "task_format": ("tsv", TASK),
    "task_train_data": (["x.jsonl"], TASK),
    "task_valid_data": (["x.jsonl"], TASK),
    "task_fields": ({"text": "t"}, TASK),
    "task_labels": (["a", "b"], TASK),
    "task_choices": (2, {**TASK, "task_labels": None}),
    "task_predictions": ("x", {**TASK, "task_valid_data": ["x.jsonl"]}),
    "pack_impl": ("unpacked", {}),
    "eod_mask_loss": (True, {}),
    "valid_same_samples": (True, {}),
    "mmap_warmup": (True, {}),
    "eval_interval": (7, TASK),
    **WHERE_RETRIEVAL_MATTERS,
    **WHERE_RETRO_MATTERS,
    "z_loss": (0.1, {"train_impl": "rm"}),
    "online_dataserver_ips": (["x"], {"dataset_impl": "online"}),
    "online_dataserver_ports": ([1], {"dataset_impl": "online"}),
    "top_k": (4, {"temperature": 0.5}),
    "top_p": (0.5, {"temperature": 0.5}),
    "min_p": (0.5, {"temperature": 0.5}),
}

# Where SMALL itself lets a key matter, what takes its effect away.
WHERE_IT_DOES_NOT: dict[str, dict[str, Any]] = {
    "sparsity_config": {"attention_config": ["global", "global"]},
    "sliding_window_width": {"attention_config": ["local", "local"]},
    **{key: {"attention_config": ["flash", "flash"]} for key in SOFTMAX_KEYS},
    "use_apex_adam": {"optimizer": {"type": "lion", "params": {"lr": 1e-4}}},
    **{
        key: {"attention_config": ["mamba", "mamba"]}
        for key in (
            *("add_qkv_bias", "softmax_scale", "softmax_type", "attn_logit_softcapping"),
            "attention_output_gate",
        )
    },
    "layer_types": {"attention_config": ["mamba", "mamba"], "layer_type_options": {"a": {}}},
    "layernorm_epsilon": {"norm": "rmsnorm"},
    "init_method_std": {"init_method": "small_init", "output_layer_init_method": "wang_init"},
    "warmup": {"warmup_iters": 3},
    "min_lr": {"lr_decay_style": "constant"},
    "split": SETS,
    "eval_interval": {**TASK, "train_iters": None, "train_epochs": 2},
    **dict.fromkeys(("pack_impl", "eod_mask_loss", "valid_same_samples", "mmap_warmup"), TASK),
    **{key: {"use_wandb": False} for key in WHERE_IT_MATTERS if key.startswith("wandb_")},
}

# An effect on every run that trains, or on how it is started and reported; or read by DeepSpeed as it stands.
EVERY_RUN = frozenset(
    """
    ema_decay skip_outlier_steps
    sinks fused_linear_cross_entropy kernels bias_gelu_fusion bias_dropout_fusion rope_fusion layernorm_fusion
    rmsnorm_fusion use_flashattn_swiglu
    num_layers hidden_size num_attention_heads num_kv_heads kv_channels seq_length max_position_embeddings
    multi_latent_attention mtp_num_layers attention_mask lm_head bert_binary_head num_token_types
    encoder_num_layers decoder_num_layers encoder_seq_length decoder_seq_length retro_add_retriever
    intermediate_size expansion_factor mlp_multiple_of activation norm norm_placement embedding_norm use_qk_layernorm
    value_residual
    use_bias_in_norms final_logit_softcapping scale_embeddings embedding_multiplier residual_multiplier logit_scale
    use_bias_in_attn_linear use_bias_in_mlp gpt_j_residual no_weight_tying attention_config hidden_dropout
    attention_dropout pos_emb opt_pos_emb_offset soft_prompt_tuning lora init_method output_layer_init_method
    compile moe_num_experts pipe_parallel_size model_parallel_size context_parallel_size checkpoint_activations
    recompute_granularity optimizer weight_decay gradient_clipping clip_grad use_bnb_optimizer lr_decay_style
    lr_decay_iters lr_decay_fraction warmup_iters precision fp16 bf16 fp8 data_types fp32_allreduce zero_optimization
    prescale_gradients gradient_predivide_factor communication_data_type steps_per_print wall_clock_breakdown
    dump_state flops_profiler comms_logger activation_checkpointing curriculum_learning tensorboard wandb
    csv_monitor checkpoint deepspeed_extra_args data_path train_data_paths valid_data_paths test_data_paths
    data_impl reset_attention_mask reset_position_ids num_workers use_shared_fs
    tokenizer_type make_vocab_size_divisible_by train_batch_size train_micro_batch_size_per_gpu
    gradient_accumulation_steps rampup_batch_size train_iters train_epochs train_samples lr_decay_samples train_impl
    eval_iters seed deterministic exit_interval exit_duration on_nan char_level_ppl use_mup
    coord_check save_base_shapes te_columnparallel te_rowparallel te_layernorm_mlp te_mha save load
    hf_architecture log_interval
    log_dir tensorboard_dir use_wandb use_comet git_hash peak_theoretical_tflops fingerprint_interval log_grad_norm
    log_grad_pct_zeros log_param_norm loss_spike_factor log_optimizer_states log_gradient_noise_scale
    memory_profiling profile config_files
    """.split()  # noqa: SIM905 (a hundred quoted names are harder to read)
)

# What SMALL with this value is refused for: alone it would mean nothing.
REFUSED: dict[str, Any] = {
    "deepspeed": False,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "num_unique_layers": 1,
    "moe_expert_parallel_size": 2,
    "sequence_parallel": True,
    "optimizer_type": "lion",
    "lr": 0.5,
    "batch_size": 7,
    "data_efficiency": {"enabled": True},
    "train_label_data_paths": ["x"],
    "base_shapes_file": "x",
    "mup_init_scale": 2.0,
    "mup_attn_temp": 2.0,
    "mup_output_temp": 2.0,
    "mup_embedding_mult": 2.0,
    "mup_rp_embedding_mult": 2.0,
    "te_fp8_mha": True,
    "iteration": 5,
    "finetune": True,
    "s3_path": "s3://bucket/x",
    "num_classes": 2,
    "pretrained_checkpoint": "x",
}
PAIRS = {
    key
    for key in FIELDS
    if key.startswith(("pos_", "neg_")) and key.endswith("_data_paths") and key != "pos_train_data_paths"
}
"""Sets of pairs, which launching refuses by name together with pos_train_data_paths."""

REPORTED_AT_THE_START = {"vocab_size", "padded_vocab_size", "world_size"}
"""Held against the tokenizer (tests/engine/test_vocabulary.py) and the machines once these are known."""


def warned_keys(changes: dict[str, Any]) -> set[str]:
    """Returns the keys that SMALL with changes has warnings about."""
    world = 2 if 2 in (changes.get("pipe_parallel_size"), changes.get("context_parallel_size")) else 1
    warnings = resolved(world, **changes).warnings
    return {line.partition(": ")[2].partition(" ")[0] for line in warnings if "has no effect" in line}


def test_every_key_is_accounted_for() -> None:
    dependent = {key for entry in DEPENDENT for key in entry.keys}
    assert dependent == WHERE_IT_MATTERS.keys()
    others = {name for name, field in FIELDS.items() if field.section in ("generation", "evaluation", "launch")}
    known = [
        dependent - others,
        set(IGNORED_HINTS),
        set(UNUSED_KEYS) - others,
        {gap.key for gap in GAPS} - others,
        set(DERIVED_ONLY),
    ]
    known += [EVERY_RUN, set(REFUSED), PAIRS, REPORTED_AT_THE_START, others]
    assert sorted(FIELDS.keys() - set().union(*known)) == []
    assert sorted(set().union(*known) - FIELDS.keys()) == []
    assert sorted(EVERY_RUN & (dependent | set(IGNORED_HINTS) | set(UNUSED_KEYS) | set(REFUSED))) == []


@pytest.mark.parametrize("key", sorted(WHERE_IT_MATTERS))
def test_a_key_gets_a_line_exactly_where_nothing_reads_it(key: str) -> None:
    value, base = WHERE_IT_MATTERS[key]
    assert value != FIELDS[key].default
    assert key in warned_keys({**WHERE_IT_DOES_NOT.get(key, {}), key: value})
    if base is not None:
        assert key not in warned_keys({**base, key: value})


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_key_that_contradicts_the_rest_is_refused(key: str) -> None:
    assert any(key in line for line in errors(**{key: REFUSED[key]}))


def test_keys_that_the_user_did_not_write_get_no_line() -> None:
    assert resolved().warnings == []


def test_a_world_that_is_not_there_is_reported() -> None:
    warnings = resolve([], {**SMALL, "world_size": 3}, Resources(2)).warnings
    assert warnings == ["command line: world_size = 3: has no effect; 2 is what the machines offer"]


def test_saves_and_profiles_behind_the_end_are_reported() -> None:
    saved = resolved(save="x", extra_save_iters=[0, -1, 50, 101], checkpoint_factor=10)
    assert any("the run has no iteration -1, 101" in line for line in saved.warnings)
    profiled = resolved(profile=True, profile_step_start=200, profile_step_stop=201)
    assert any("the run ends at iteration 100" in line for line in profiled.warnings)


def test_steps_that_on_nan_leaves_out_have_a_limit_in_every_precision() -> None:
    """A key that has an effect gets no line."""
    assert "overflow_limit" not in warned_keys({"overflow_limit": 5, "on_nan": "skip", "precision": "bfloat16"})
    assert "overflow_limit" in warned_keys({"overflow_limit": 5, "precision": "bfloat16"})
