"""Renamed keys of older GPT-NeoX releases are mapped; keys of other programs are rejected with the name here."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config.yaml_loader import SourcedValue
from megatron.errors import ConfigIssue

RENAMED = {
    "gas": "gradient_accumulation_steps",
    "autotuning_config": "autotuning",
    "save_iters": "extra_save_iters",
    "save_interval": "checkpoint_factor",
    "num_experts": "moe_num_experts",
}
"""Old key -> new key with the same meaning."""

IGNORED = {
    "detect_nvlink_pairs": "NCCL finds the links between accelerators itself",
    "zero_allow_untested_optimizer": "every optimizer here is tried with ZeRO",
    "moe_type": "there is one way to compute experts",
    "enable_expert_tensor_parallelism": "experts are sharded like every other layer, over model_parallel_size ranks",
}
"""Key -> reason why it has no effect; reported as a warning."""

REFUSED = {
    "attention_type": "write attention_config: [[[global], all]] with the kind of attention in it",
    "mlp_type": "write activation: swiglu with use_bias_in_mlp: false for the LLaMA MLP",
    "lr_warmup_iters": "write warmup_iters",
    "decay_lr_to": "write min_lr, the learning rate itself",
    "fp8_margin": "write te_fp8_margin",
    "hf_tokenizer": "write tokenizer_type: HFTokenizer with vocab_file",
    "global_batch_size": "write train_batch_size",
    "micro_batch_size": "write train_micro_batch_size_per_gpu",
    "tensor_model_parallel_size": "write model_parallel_size",
    "tensor_parallel_size": "write model_parallel_size",
    "pipeline_model_parallel_size": "write pipe_parallel_size",
    "num_query_groups": "write num_kv_heads",
    "ffn_hidden_size": "write intermediate_size; a gated activation uses a third of it",
    "moe_loss_coeff": "write moe_aux_loss_coeff",
    "moe_token_dropping": "give moe_capacity_factor to drop tokens beyond it; without it none is dropped",
    "moe_train_capacity_factor": "write moe_capacity_factor",
    "learning_rate": "write optimizer: {type: Adam, params: {lr: ...}}",
    "bf16_enabled": "write precision: bfloat16",
    "max_steps": "write train_iters",
    "num_train_epochs": "write train_epochs",
    "num_epochs": "write train_epochs",
    "per_device_train_batch_size": "write train_micro_batch_size_per_gpu",
    "micro_batch_size_per_gpu": "write train_micro_batch_size_per_gpu",
    "train_micro_batch_size": "write train_micro_batch_size_per_gpu",
    "num_hidden_layers": "write num_layers",
    "num_key_value_heads": "write num_kv_heads",
    "head_dim": "write kv_channels",
    "max_seq_length": "write seq_length",
    "max_seq_len": "write seq_length",
    "model_max_length": "write seq_length",
    "rope_theta": "write rotary_emb_base",
    "rotary_base": "write rotary_emb_base",
    "rotary_percent": "write rotary_pct",
    "rms_norm_eps": "write rms_norm_epsilon",
    "layer_norm_eps": "write layernorm_epsilon",
    "normalization": "write norm",
    "position_embedding_type": "write pos_emb",
    "hidden_act": "write activation",
    "tie_word_embeddings": "write no_weight_tying, which says the opposite",
    "untie_embeddings_and_output_weights": "write no_weight_tying",
    "max_grad_norm": "write gradient_clipping",
    "warmup_steps": "write warmup_iters",
    "warmup_ratio": "write warmup, the part of the decay horizon",
    "lr_warmup_fraction": "write warmup, the part of the decay horizon",
    "lr_warmup_samples": "write warmup, the part of lr_decay_samples",
    "lr_scheduler_type": "write lr_decay_style",
    "adam_beta1": "write optimizer: {type: Adam, params: {betas: [...]}}",
    "adam_beta2": "write optimizer: {type: Adam, params: {betas: [...]}}",
    "adam_eps": "write optimizer: {type: Adam, params: {eps: ...}}",
    "gradient_checkpointing": "write checkpoint_activations",
    "recompute_activations": "write recompute_granularity: selective",
    "logging_steps": "write log_interval",
    "eval_steps": "write eval_interval",
    "save_steps": "write checkpoint_factor",
    "output_dir": "write save",
    "use_flash_attn": "write attention_config: [[[flash], all]]",
    "zero_optimization_stage": "write zero_optimization: {stage: 1}",
}
"""Rejected key -> hint."""


SPARSITY: dict[object, tuple[str, ...]] = {
    None: ("global",),
    "none": ("global",),
    "all": ("sparse_variable",),
    "interspersed": ("global", "sparse_variable"),
}
"""Value of `sparsity` -> attention kinds, which repeat over the blocks."""


def _sparsity_to_attention(values: Mapping[str, SourcedValue]) -> SourcedValue | ConfigIssue:
    """Converts `sparsity` to attention_config."""
    given = values["sparsity"]
    if "attention_config" in values:
        other = values["attention_config"]
        what = f"attention_config, which is given at {other.location}, says what each block attends to"
        return ConfigIssue(what, "sparsity", given.value, given.location, "keep one of the two")
    if isinstance(given.value, (list, dict)) or given.value not in SPARSITY:
        return ConfigIssue("it is none, all or interspersed", "sparsity", given.value, given.location)
    kinds = SPARSITY[given.value]
    layers = values["num_layers"].value if "num_layers" in values else None
    if not isinstance(layers, int) or isinstance(layers, bool):
        return SourcedValue([[list(kinds), "all"]], given.location)
    return SourcedValue([kinds[number % len(kinds)] for number in range(max(0, min(layers, 100_000)))], given.location)


_BFLOAT16 = frozenset({"bfloat16", "bf16"})


def _convert_old_precision(
    values: Mapping[str, SourcedValue],
) -> tuple[dict[str, SourcedValue], list[ConfigIssue], list[str]]:
    """Converts `precision: {type: ...}` and `fp16: {type: bfloat16}` to today's form."""
    renamed = dict(values)
    issues: list[ConfigIssue] = []
    warnings: list[str] = []
    precision, block = values.get("precision"), values.get("fp16")
    if precision is not None and isinstance(precision.value, Mapping) and set(precision.value) == {"type"}:
        precision = renamed["precision"] = SourcedValue(precision.value["type"], precision.location)
        warnings.append(f"{precision.location}: precision = {{type: ...}}: read as precision: {precision.value}")
    kind = str(block.value.get("type", "")).lower() if block is not None and isinstance(block.value, Mapping) else ""
    if block is None or kind not in _BFLOAT16 or block.value.get("enabled", True) is False:
        return renamed, issues, warnings
    del renamed["fp16"]
    if precision is not None and str(precision.value).lower() not in _BFLOAT16:
        what = f"a block of type {kind} asks for bfloat16, and precision, at {precision.location}, for another one"
        issues.append(ConfigIssue(what, "fp16", block.value, block.location, "keep one of the two"))
    else:
        renamed["precision"] = SourcedValue("bfloat16", block.location)
        warnings.append(
            f"{block.location}: fp16 = {{type: {kind}}}: read as precision: bfloat16, which has no loss scale"
        )
    return renamed, issues, warnings


def apply_renames(values: Mapping[str, SourcedValue]) -> tuple[dict[str, SourcedValue], list[ConfigIssue], list[str]]:
    """Returns the values under today's keys, the issues of rejected keys, and warnings for keys without effect."""
    renamed: dict[str, SourcedValue] = {}
    values, issues, warnings = _convert_old_precision(values)
    for name, given in values.items():
        if name == "sparsity":
            attention = _sparsity_to_attention(values)
            if isinstance(attention, ConfigIssue):
                issues.append(attention)
            else:
                renamed["attention_config"] = attention
        elif name in REFUSED:
            what = "this is a key of another release or program"
            issues.append(ConfigIssue(what, name, given.value, given.location, REFUSED[name]))
        elif name in IGNORED:
            warnings.append(f"{given.location}: {name} = {given.value!r}: has no effect; {IGNORED[name]}")
        elif name in RENAMED and RENAMED[name] in values:
            other = values[RENAMED[name]]
            what = f"this is an older name of {RENAMED[name]}, which is given at {other.location}"
            issues.append(ConfigIssue(what, name, given.value, given.location, "keep one of the two"))
        elif name in RENAMED:
            warnings.append(f"{given.location}: {name} = {given.value!r}: an older name, read as {RENAMED[name]}")
            renamed[RENAMED[name]] = given
        else:
            renamed[name] = given
    return renamed, issues, warnings
