"""What a configuration may ask for and does not get yet, and what has no effect.

Three tables, read against the resolved values: features that are not built (launching refuses, naming them), hints
about speed and keys that nothing reads (one warning line each). Building a feature shrinks a table.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.config import FIELDS, Config
from megatron.config.validation.dependent_keys import (
    dependent_without_effect,
    profile_never_starts,
    saves_that_never_come,
)
from megatron.registry import (
    ACTIVATIONS,
    ATTENTION,
    INITS,
    NORMS,
    OBJECTIVES,
    OPTIMIZERS,
    POSITIONS,
    SCHEDULES,
    TOKENIZERS,
    Family,
)


@dataclass(frozen=True)
class UnsupportedKey:
    """One key whose feature is not built. asked: whether this value asks for it."""

    key: str
    told: str
    asked: Callable[[Any], bool]


def _on(value: Any) -> bool:
    """A switch that is on, or a block that is there and not disabled."""
    if isinstance(value, Mapping):
        return bool(value) and value.get("enabled", True) is not False
    return bool(value)


FAMILIES: Mapping[str, Family[Any]] = {
    "norm": NORMS,
    "pos_emb": POSITIONS,
    "activation": ACTIVATIONS,
    "attention_config": ATTENTION,
    "init_method": INITS,
    "output_layer_init_method": INITS,
    "optimizer_type": OPTIMIZERS,
    "lr_decay_style": SCHEDULES,
    "tokenizer_type": TOKENIZERS,
    "train_impl": OBJECTIVES,
}
"""Keys that name a part: a name that the family does not list is not built."""

GAPS: tuple[UnsupportedKey, ...] = (
    UnsupportedKey("dataset_impl", "pairwise and online samples", lambda value: value != "gpt2"),
    UnsupportedKey("train_reward_data_paths", "learning from rewards", _on),
    UnsupportedKey("pos_train_data_paths", "pairs of answers", _on),
    UnsupportedKey("serve_model_weights", "serving weights while training", _on),
    UnsupportedKey("adlr_autoresume", "requeueing through NVIDIA's scheduler", _on),
    UnsupportedKey("autotuning", "DeepSpeed's autotuner", _on),
    UnsupportedKey("amp", "Apex mixed precision, gone from DeepSpeed; precision: bfloat16 replaces it", _on),
    UnsupportedKey("sparse_gradients", "sparse gradients, gone from DeepSpeed", _on),
    UnsupportedKey(
        "sparse_attention", "DeepSpeed's sparse attention, gone from it; attention_config names the kinds", _on
    ),
    UnsupportedKey("elasticity", "elastic world sizes, gone from DeepSpeed", _on),
    UnsupportedKey("compression_training", "compressed training, gone from DeepSpeed", _on),
    UnsupportedKey("lazy_mpu_init", "process groups made by the caller", _on),
)


IGNORED_HINTS = {
    "scaled_upper_triang_masked_softmax_fusion": "attention runs through torch's fused kernels",
    "scaled_masked_softmax_fusion": "attention runs through torch's fused kernels",
    "bias_gelu_fusion": "the plain operations run",
    "bias_dropout_fusion": "the plain operations run",
    "rope_fusion": "the plain operations run",
    "layernorm_fusion": "torch's kernel runs",
    "rmsnorm_fusion": "torch's kernel runs",
    "use_flashattn_swiglu": "the plain operations run",
    "mamba_selective_fp32_params": "the optimizer keeps fp32 copies at ZeRO 1 and above, and DeepSpeed casts the rest",
    "attention_softmax_in_fp32": "scores and softmax are in fp32 in every attention kernel",
    "apply_query_key_layer_scaling": "scores are made in fp32, where no scaling is needed to keep them in range",
    "fp16_lm_cross_entropy": "the loss is taken block by block in fp32, without an fp32 copy of the logits to save",
    "fused_kernels_build_path": "nothing is compiled at run time",
    "use_cpu_initialization": "initial weights are always drawn on the CPU, so that no layout changes them",
    "rotary_save_freqs_buffer": "the frequencies are computed anew",
    "deepspeed_activation_checkpointing": "recomputation does not depend on it",
}
"""Wishes about speed that nothing takes up; results do not change."""

UNUSED_KEYS = {
    "param_sharing_style": "nothing reads it",
    "weight_server_port": "nothing reads it",
    "short_seq_prob": "it belongs to masked language models",
    "adlr_autoresume_interval": "nothing reads it",
    "deepscale": "it is an older name of DeepSpeed",
    "deepscale_config": "it is an older name of DeepSpeed",
    "hysteresis": "the fp16 block decides",
    "loss_scale": "the fp16 block decides",
    "loss_scale_window": "the fp16 block decides",
    "min_scale": "the fp16 block decides",
    "moe_lbl_in_fp32": "the loss is always computed in fp32",
    "onnx_safe": "nothing reads it",
    "scheduler": "lr_decay_style and its companions decide",
    "curriculum_seqlen": "curriculum_learning decides",
    "comet_experiment": "nothing reads it",
    "output_layer_parallelism": "there is one way to cut the output layer",
    "do_train": "the data decides",
    "do_valid": "the data decides",
    "do_test": "the data decides",
}
"""Keys that public configurations may carry and nothing reads."""


def not_supported_yet(config: Config) -> list[str]:
    """One line for each value whose feature is not built: `key = value: what is not built yet`."""
    values = config.flat()
    lines = []
    for key, family in FAMILIES.items():
        names = values[key] if isinstance(values[key], tuple) else (values[key],)
        missing = sorted({name for name in names if name is not None and name not in family})
        lines += [f"{key} = {name!r}: this {family.kind} is not built yet" for name in missing]
    lines += [
        f"{gap.key} = {values[gap.key]!r}: not built yet: {gap.told}" for gap in GAPS if gap.asked(values[gap.key])
    ]
    return lines


def without_effect(config: Config, given: Container[str] | None = None) -> list[str]:
    """One line for each key set to something other than its default that changes nothing.

    given: the keys that the user wrote; None to look at all.
    """
    values = config.flat()
    told = {**IGNORED_HINTS, **UNUSED_KEYS, **dict(dependent_without_effect(config))}
    if config.data.data_path is None and config.data.train_data_paths is None:
        told.pop("split", None)  # the data may be named elsewhere
    late = saves_that_never_come(config)
    if late:
        told["extra_save_iters"] = f"the run has no iteration {', '.join(map(str, late))}"
    if profile_never_starts(config):
        told["profile_step_start"] = f"the run ends at iteration {config.training.train_iters}"
    return [
        f"{key} = {values[key]!r}: has no effect; {why}"
        for key, why in told.items()
        if values[key] != FIELDS[key].default and (given is None or key in given)
    ]
