"""Keys that are not implemented (rejected at launch), and keys that have no effect (warned).

Three tables, compared with the resolved values: features that are not built, performance hints that are ignored, and
keys that nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.config import FIELDS, Config
from megatron.config.validation.dependent_keys import (
    dependent_without_effect,
    profile_never_starts,
    unreachable_saves,
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
    Registry,
)


@dataclass(frozen=True)
class UnsupportedKey:
    """A key whose feature is not built."""

    key: str
    """The key."""
    feature: str
    """The feature, for the message."""
    requested: Callable[[Any], bool]
    """Whether a value requests it."""


def _is_enabled(value: Any) -> bool:
    """Returns whether a switch is on, or a block is given and not disabled."""
    if isinstance(value, Mapping):
        return bool(value) and value.get("enabled", True) is not False
    return bool(value)


FAMILIES: Mapping[str, Registry[Any]] = {
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
"""Keys that name a component: a name that the registry does not list is not built."""

GAPS: tuple[UnsupportedKey, ...] = (
    UnsupportedKey("dataset_impl", "pairwise and online samples", lambda value: value != "gpt2"),
    UnsupportedKey("train_reward_data_paths", "learning from rewards", _is_enabled),
    UnsupportedKey("pos_train_data_paths", "pairs of answers", _is_enabled),
    UnsupportedKey("serve_model_weights", "serving weights while training", _is_enabled),
    UnsupportedKey("adlr_autoresume", "requeueing through NVIDIA's scheduler", _is_enabled),
    UnsupportedKey("autotuning", "DeepSpeed's autotuner", _is_enabled),
    UnsupportedKey("amp", "Apex mixed precision, removed from DeepSpeed; precision: bfloat16 replaces it", _is_enabled),
    UnsupportedKey("sparse_gradients", "sparse gradients, removed from DeepSpeed", _is_enabled),
    UnsupportedKey(
        "sparse_attention", "DeepSpeed's sparse attention, gone from it; attention_config names the kinds", _is_enabled
    ),
    UnsupportedKey("elasticity", "elastic world sizes, removed from DeepSpeed", _is_enabled),
    UnsupportedKey("compression_training", "compressed training, removed from DeepSpeed", _is_enabled),
    UnsupportedKey("lazy_mpu_init", "process groups made by the caller", _is_enabled),
)


IGNORED_HINTS = {
    "mamba_selective_fp32_params": "the optimizer keeps fp32 copies at ZeRO 1 and above, and DeepSpeed casts the rest",
    "attention_softmax_in_fp32": "the softmax is in fp32 in every attention kernel",
    "apply_query_key_layer_scaling": "scores are divided in fp32, so no scaling is needed to keep them in range",
    "fp16_lm_cross_entropy": "the loss is taken block by block in fp32, without an fp32 copy of the logits to save",
    "fused_kernels_build_path": "nothing is compiled at run time",
    "use_cpu_initialization": "initial weights are always drawn on the CPU, so that no layout changes them",
    "rotary_save_freqs_buffer": "the frequencies are computed anew",
    "deepspeed_activation_checkpointing": "recomputation does not depend on it",
}
"""Performance hints that are ignored; results do not change."""

UNUSED_KEYS = {
    "param_sharing_style": "nothing reads it",
    "weight_server_port": "nothing reads it",
    "adlr_autoresume_interval": "nothing reads it",
    "deepscale": "it is an older name of DeepSpeed",
    "deepscale_config": "it is an older name of DeepSpeed",
    "hysteresis": "the fp16 block takes precedence",
    "loss_scale": "the fp16 block takes precedence",
    "loss_scale_window": "the fp16 block takes precedence",
    "min_scale": "the fp16 block takes precedence",
    "moe_lbl_in_fp32": "the loss is always computed in fp32",
    "onnx_safe": "nothing reads it",
    "scheduler": "lr_decay_style and its keys take precedence",
    "curriculum_seqlen": "curriculum_learning takes precedence",
    "comet_experiment": "nothing reads it",
    "output_layer_parallelism": "there is one way to shard the output layer",
    "do_train": "the data decides",
    "do_valid": "the data decides",
    "do_test": "the data decides",
}
"""Keys that public configurations may carry and nothing reads."""


def not_supported_yet(config: Config) -> list[str]:
    """Returns one line for each value whose feature is not built: `key = value: not built yet: feature`."""
    values = config.flat()
    lines = []
    for key, family in FAMILIES.items():
        names = values[key] if isinstance(values[key], tuple) else (values[key],)
        missing = sorted({name for name in names if name is not None and name not in family})
        lines += [f"{key} = {name!r}: this {family.kind} is not built yet" for name in missing]
    lines += [
        f"{gap.key} = {values[gap.key]!r}: not built yet: {gap.feature}"
        for gap in GAPS
        if gap.requested(values[gap.key])
    ]
    return lines


def keys_without_effect(config: Config, given: Container[str] | None = None) -> list[str]:
    """Returns one line for each key without effect whose value is not its default.

    given: the keys that the user wrote; None for all keys.
    """
    values = config.flat()
    reasons = {**IGNORED_HINTS, **UNUSED_KEYS, **dict(dependent_without_effect(config))}
    if config.data.data_path is None and config.data.train_data_paths is None:
        reasons.pop("split", None)  # the data may be named elsewhere
    late = unreachable_saves(config)
    if late:
        reasons["extra_save_iters"] = f"the run has no iteration {', '.join(map(str, late))}"
    if profile_never_starts(config):
        reasons["profile_step_start"] = f"the run ends at iteration {config.training.train_iters}"
    return [
        f"{key} = {values[key]!r}: has no effect; {why}"
        for key, why in reasons.items()
        if values[key] != FIELDS[key].default and (given is None or key in given)
    ]
