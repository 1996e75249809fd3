"""Settings that change no tensor's shape, and make another model of the same weights.

A checkpoint holds the configuration that it was trained with, and whoever loads it is held against that: with another
number of heads every tensor fits, and nothing that the model says is right. Megatron-LM compares its arguments likewise
(megatron/training/checkpointing.py, check_checkpoint_args). What muP makes of the weights is in mup_check.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.adapter_config import SAVED, low_rank
from megatron.checkpoint.format.optimizer_shards import OptimizerState
from megatron.config.config import FIELDS
from megatron.errors import ConfigError, ConfigIssue
from megatron.log import get_logger
from megatron.param_table import NAMED_KINDS, TensorShape, is_adapter_tensor
from megatron.registry import GATED_DELTA_NET, LEARNABLE, RETRIEVAL_HEAD, WITHOUT_ATTENTION

_log = get_logger(__name__)

Values = Mapping[str, Any]
Concerned = Callable[[Values], bool]


def _always(values: Values) -> bool:
    return True


def _attends(values: Values) -> bool:
    return not set(values["attention_config"] or ()) <= set(WITHOUT_ATTENTION)


def _deltas(values: Values) -> bool:
    return GATED_DELTA_NET in (values["attention_config"] or ())


def _rotary(values: Values) -> bool:
    return values["pos_emb"] == "rotary"


def _experts(values: Values) -> bool:
    return values["moe_num_experts"] > 1


def _mamba2(values: Values) -> bool:
    return "mamba2" in (values["attention_config"] or ())


def _retrieves(values: Values) -> bool:
    return bool(values.get("retro_add_retriever"))


_MODEL: dict[str, Concerned] = {
    "num_attention_heads": _attends,
    "num_kv_heads": _attends,
    "kv_channels": _attends,
    "activation": _always,
    "norm": _always,
    "gpt_j_residual": _always,
    "gpt_j_tied": _always,
    "attention_config": _always,
    "attention_mask": _always,
    "lm_head": _always,
    "bert_binary_head": _always,
    "num_token_types": _always,
    "encoder_num_layers": _always,
    "retrieval_shared_encoder": lambda values: values["lm_head"] == RETRIEVAL_HEAD,
    "norm_placement": _always,
    "embedding_norm": _always,
    "softmax_scale": _attends,
    "softmax_type": _attends,
    "attention_output_gate": _attends,
    "value_residual": _attends,
    "activation_func_clamp_value": _always,
    "glu_linear_offset": _always,
    "scale_embeddings": _always,
    "embedding_multiplier": _always,
    "residual_multiplier": _always,
    "logit_scale": _always,
    "pos_emb": _always,
    "rotary_pct": _rotary,
    "opt_pos_emb_offset": lambda values: values["pos_emb"] == "learned",
    "rpe_max_distance": lambda values: values["pos_emb"] in ("rpe", "relative"),
    "moe_top_k": _experts,
    "moe_router_type": _experts,
    "moe_normalize_top_k": _experts,
    "moe_router_score_function": _experts,
    "moe_router_pre_softmax": _experts,
    "moe_router_num_groups": _experts,
    "moe_router_group_topk": _experts,
    "moe_router_group_experts": lambda values: _experts(values) and (values.get("moe_router_num_groups") or 1) > 1,
    "moe_router_topk_scaling_factor": _experts,
    **dict.fromkeys(("mamba_num_groups", "mamba_state_dim", "mamba_dt_limit", "mamba_norm_before_gate"), _mamba2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"), _deltas),
    **dict.fromkeys(("retro_chunk_length", "retro_num_neighbors", "retro_num_retrieved_chunks"), _retrieves),
    "lora": _always,
    "task_labels": lambda values: (values.get("num_classes") or 0) > 1,
}
"""Keys that a trained model fixes: key -> whether it has an effect on a model of these values."""
_ADJUSTED: dict[str, Concerned] = {
    "rotary_emb_base": _rotary,
    "rope_scaling": _rotary,
    "sliding_window_width": _always,
    "sparsity_config": _always,
    "layer_types": _attends,
    "layer_type_options": lambda values: values["layer_types"] is not None,
    "attn_logit_softcapping": _attends,
    "final_logit_softcapping": _always,
    "layernorm_epsilon": lambda values: "layernorm" in values["norm"],
    "rms_norm_epsilon": lambda values: "rmsnorm" in values["norm"] or _mamba2(values),
    "scalenorm_epsilon": lambda values: values["norm"] == "scalenorm",
}
"""Keys that are changed on purpose at times, as for longer texts: a warning, no error."""
_HEADS = frozenset({"lm_head", "bert_binary_head", "task_labels", "retrieval_shared_encoder"})
"""Keys of heads, which a classifier replaces."""
_LATER = frozenset(
    {
        *("softmax_type", "activation_func_clamp_value", "glu_linear_offset", "norm_placement", "softmax_scale"),
        "embedding_norm",
        *("scale_embeddings", "embedding_multiplier", "residual_multiplier", "logit_scale"),
        *("attn_logit_softcapping", "final_logit_softcapping", "attention_output_gate"),
        "value_residual",
    }
)
"""Keys that checkpoints of earlier releases lack, whose models are those of the default."""
_SAME = {"flash": "global", "te_rmsnorm": "rmsnorm", "te_layernorm": "layernorm", "swish": "silu"}


def same_model(stored: Values, own: Values, location: Path, *, finetune: bool, new_head: bool = False) -> None:
    """ConfigError for each key that would make another model of the weights; a line for those that may be changed.

    Args:
        stored: Flat keys of the checkpoint's configuration and of the reader's; keys that the stored one lacks are not
            compared, but for those of later releases, which have their default there.
        own: See `stored`.
        location: The checkpoint, for messages.
        finetune: Training starts anew from the weights, so that every change is a warning and none is refused.
        new_head: The model gets another head on purpose.
    """
    if stored.get("hidden_size", own.get("hidden_size")) != own.get("hidden_size"):
        return  # the tensors have other shapes, which reading them reports
    differing = [key for key in _differing(_MODEL, stored, own) if not (new_head and key in _HEADS)]
    reported = [*(differing if finetune else []), *_differing(_ADJUSTED, stored, own)]
    for key in reported:
        _log.warning(
            "%s = %r: the checkpoint %s was trained with %r, and is another model with this value",
            key,
            own[key],
            location,
            _value(stored, key),
        )
    if not finetune:
        ConfigError.raise_any(
            ConfigIssue(
                f"the checkpoint {location} was trained with {_value(stored, key)!r}, and with another value its "
                "weights are another model",
                key=key,
                value=own[key],
                hint="give the value of that run"
                + ("" if _changes_tensors(key, stored, own) else "; finetune: true trains on with another one"),
            )
            for key in differing
        )


def same_trained(table: Sequence[TensorShape], stored: OptimizerState, location: Path) -> None:
    """ConfigError where other matrices were trained beside adapters than `modules_to_save` names now.

    Args:
        table: Tensors of the reader's model.
        stored: The optimizer state, which holds what was trained.
        location: The checkpoint, for messages.
    """
    if not any(is_adapter_tensor(shape) for shape in table):
        return
    matrices = [shape for shape in table if shape.kind in NAMED_KINDS]
    then = {NAMED_KINDS[shape.kind] for shape in matrices if shape.key in stored.locations}
    now = {NAMED_KINDS[shape.kind] for shape in matrices if shape.trained}
    if then != now:
        raise ConfigError.of(
            f"the optimizer state of the checkpoint {location} is that of modules_to_save: {_listed(then)}, and the "
            f"configuration has {_listed(now)}",
            key="lora",
            hint="give the modules_to_save of that run, or set no_load_optim: true to start the optimizer anew",
        )


def _listed(names: set[str]) -> str:
    return f"[{', '.join(name for name in SAVED if name in names)}]"


def _differing(keys: Mapping[str, Concerned], stored: Values, own: Values) -> Iterator[str]:
    for key, concerns in keys.items():
        known = key in stored or (key in _LATER and "hidden_size" in stored)
        if not known or not concerns(own):
            continue
        if concerns is _retrieves and not _retrieves(stored):
            continue  # what reads neighbours is added, which tensors say
        if key == "lora":
            then, now = low_rank(stored[key]), low_rank(own[key])
            if then is None or now is None or then.rank != now.rank:  # another rank: other tensors
                continue
            if then.scale != now.scale or (now.base is not None and then.base != now.base):
                yield key
        elif key == "task_labels" and _unnamed(stored[key]):
            continue
        elif _meaning(_value(stored, key)) != _meaning(own[key]):
            yield key


def _unnamed(labels: Any) -> bool:
    """Whether labels are none, or the numbers that transformers writes where none are given."""
    return not labels or list(labels) == [f"LABEL_{number}" for number in range(len(labels))]


def _value(stored: Values, key: str) -> Any:
    """Returns the value of a checkpoint's configuration, the default where it lacks a key of later releases."""
    return stored.get(key, FIELDS[key].default)


def _changes_tensors(key: str, stored: Values, own: Values) -> bool:
    """Returns whether a model with the other value has other tensors, so that it cannot be trained on either."""
    if key == "softmax_type":
        return LEARNABLE in (stored.get(key), own[key])
    return key in ("attention_output_gate", "value_residual")


def _meaning(value: Any) -> Any:
    """The value, with one name for each operation."""
    if isinstance(value, list | tuple):
        return [_meaning(item) for item in value]
    return _SAME.get(value, value) if isinstance(value, str) else value
