"""Fills in every value that follows from others. The functions that do the arithmetic are in `derive/`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.derive.attention import expand_attention
from megatron.config.derive.batch import Batch, derive_batch
from megatron.config.derive.horizon import decay_horizon
from megatron.config.derive.optimizer import derive_optimizer
from megatron.config.derive.precision import (
    bf16_block,
    derive_data_types,
    derive_precision,
    derive_zero,
    fp16_block,
)
from megatron.config.derive.widths import head_dim
from megatron.config.resources import Resources
from megatron.config.sections.optimizer import OPTIMIZER_CHOICES
from megatron.errors import ConfigError, Mistake

MOST_LAYERS = 10_000
INFERENCE_SCRIPTS = frozenset({"generate.py", "evaluate.py", "eval.py"})

OUTPUTS = {
    "is_pipe_parallel": "pipe_parallel_size",
    "zero_stage": "zero_optimization",
    "zero_reduce_scatter": "zero_optimization",
    "zero_contiguous_gradients": "zero_optimization",
    "zero_reduce_bucket_size": "zero_optimization",
    "zero_allgather_bucket_size": "zero_optimization",
    "dynamic_loss_scale": "loss_scale",
}
"""Keys that only report what another key decides. Giving them another value is a contradiction."""


@dataclass
class Completion:
    """The values as they grow. values: all flat keys. given: the keys that the user wrote."""

    values: dict[str, Any]
    given: Collection[str]
    resources: Resources
    derived: set[str] = field(default_factory=set)
    mistakes: list[Mistake] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def derive(self, name: str, value: Any) -> None:
        """Sets a value that follows from others; a value that stays as it was keeps its origin."""
        if name in OUTPUTS and name in self.given and self.values[name] not in (None, value):
            what, remedy = (
                f"this follows from {OUTPUTS[name]}, which makes it {value!r}",
                f"set {OUTPUTS[name]} instead",
            )
            self.mistakes.append(Mistake(what, key=name, value=self.values[name], remedy=remedy))
        if self.values[name] != value or type(self.values[name]) is not type(value):
            self.values[name] = value
            self.derived.add(name)

    def user(self, name: str) -> Any:
        """What the user gave for the key, or None."""
        return self.values[name] if name in self.given else None


def trains(user_script: str | None) -> bool:
    """Whether the script to run trains, so that batch, optimizer and length must be known."""
    return user_script is None or Path(user_script).name not in INFERENCE_SCRIPTS


def complete(values: Mapping[str, Any], given: Collection[str], resources: Resources) -> Completion:
    """Runs every step below on the values. The mistakes of all steps are collected."""
    draft = Completion(dict(values), given, resources)
    for step in STEPS:
        try:
            step(draft)
        except ConfigError as fault:
            draft.mistakes += fault.mistakes
    return draft


def _required(draft: Completion) -> None:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        if draft[name] is None:
            draft.mistakes.append(Mistake("the key is not given", key=name, remedy="every model needs it"))
        elif draft[name] < 1:
            draft.mistakes.append(Mistake("this must be at least 1", key=name, value=draft[name]))
    if (draft["num_layers"] or 0) > MOST_LAYERS:
        draft.mistakes.append(Mistake(f"at most {MOST_LAYERS:,}", key="num_layers", value=draft["num_layers"]))


def _layout(draft: Completion) -> None:
    draft.derive("world_size", draft.resources.world_size)
    if draft["model_parallel_size"] == 0:
        draft.derive("model_parallel_size", 1)
    draft.derive("is_pipe_parallel", draft["pipe_parallel_size"] >= 1)
    if draft.resources.accelerator == "cpu" and draft["distributed_backend"] == "nccl":
        draft.derive("distributed_backend", "gloo")


def _model(draft: Completion) -> None:
    layers, hidden, heads = draft["num_layers"], draft["hidden_size"], draft["num_attention_heads"]
    if draft["max_position_embeddings"] is None:
        draft.derive("max_position_embeddings", draft["seq_length"])
    if heads is not None and draft["num_kv_heads"] is None:
        draft.derive("num_kv_heads", heads)
    if heads is not None and hidden is not None and draft["kv_channels"] is None:
        draft.derive("kv_channels", head_dim(hidden, heads))
    if layers is not None and 1 <= layers <= MOST_LAYERS:
        draft.derive("attention_config", expand_attention(draft["attention_config"], layers))


def _precision(draft: Completion) -> None:
    precision = derive_precision(draft["precision"], draft["fp16"], draft["bf16"])
    draft.derive("precision", precision)
    draft.derive("fp16", fp16_block(precision, draft["fp16"]))
    draft.derive("bf16", bf16_block(precision, draft["bf16"]))
    draft.derive("data_types", derive_data_types(precision, draft["data_types"]))
    draft.derive("dynamic_loss_scale", draft["loss_scale"] is None)


def _zero(draft: Completion) -> None:
    tuned = draft["autotuning"] is not None
    zero = derive_zero(draft["precision"] or "fp32", draft["zero_optimization"], tuned=tuned)
    draft.derive("zero_optimization", zero)
    for name in ("stage", "reduce_scatter", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size"):
        draft.derive(f"zero_{name}", _as_output(name, zero.get(name)))


def _as_output(name: str, value: Any) -> Any:
    """The value in the type of its output key; None where the user wrote something else, which DeepSpeed judges."""
    if name in {"reduce_scatter", "contiguous_gradients"}:
        return value if isinstance(value, bool) else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if name == "stage" and isinstance(value, (list, str)):
        return tuple(value) if isinstance(value, list) else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _optimizer(draft: Completion) -> None:
    kind, rate = draft.user("optimizer_type"), draft.user("lr")
    if draft["optimizer"] is None and rate is None and trains(draft["user_script"]):
        draft.warnings.append("optimizer: none is given, so Adam with a learning rate of 0.001 is used")
    choice = derive_optimizer(draft["optimizer"], kind, rate, OPTIMIZER_CHOICES)
    draft.derive("optimizer", choice.block)
    draft.derive("optimizer_type", choice.kind)
    draft.derive("lr", choice.lr)
    if choice.weight_decay is not None:
        given = draft.user("weight_decay")
        if given is not None and given != choice.weight_decay:
            what = f"optimizer.params says weight_decay = {choice.weight_decay}"
            raise ConfigError.of(what, key="weight_decay", value=given, remedy="leave one of the two out")
        draft.derive("weight_decay", choice.weight_decay)


def _clipping(draft: Completion) -> None:
    clip, gradient = draft.user("clip_grad"), draft.user("gradient_clipping")
    if clip is not None and gradient is not None and clip != gradient:
        what = f"gradient_clipping = {gradient} means the same"
        raise ConfigError.of(what, key="clip_grad", value=clip, remedy="leave clip_grad out")
    if clip is not None and gradient is None:
        draft.derive("gradient_clipping", clip)
    draft.derive("clip_grad", draft["gradient_clipping"])


def _schedule(draft: Completion) -> None:
    horizon = decay_horizon(draft["train_iters"], draft["lr_decay_iters"], draft["lr_decay_fraction"])
    asked = draft.user("lr_decay_iters")
    if asked is not None and asked < 1:
        draft.mistakes.append(Mistake("it must be more than 0", key="lr_decay_iters", value=asked))
    if draft.user("lr_decay_iters") is not None and draft.user("lr_decay_fraction") is not None:
        draft.warnings.append("lr_decay_fraction: has no effect, since lr_decay_iters is given")
    draft.derive("lr_decay_iters", horizon)


def _data(draft: Completion) -> None:
    for paths_key, preferred_key, weights_key in (
        ("train_data_paths", "pos_train_data_paths", "train_data_weights"),
        ("valid_data_paths", "pos_valid_data_paths", "valid_data_weights"),
        ("test_data_paths", "pos_test_data_paths", "test_data_weights"),
    ):
        paths = draft[paths_key] or draft[preferred_key]
        if paths and draft[weights_key] is None:
            draft.derive(weights_key, (1.0,) * len(paths))


def _generation(draft: Completion) -> None:
    if draft["text_gen_type"] is None:
        draft.derive("text_gen_type", "input-file" if draft["sample_input_file"] else "unconditional")


def _batch(draft: Completion) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    share = max(1, draft["pipe_parallel_size"]) * draft["model_parallel_size"] * draft["context_parallel_size"]
    if share < 1 or draft["world_size"] % share:
        return  # a rule tells of the layout
    ranks = max(1, draft["world_size"] // share)
    if trains(draft["user_script"]):
        batch = derive_batch(draft[names[0]], draft[names[1]], draft[names[2]], ranks)
    else:
        micro = max(1, draft[names[1]] or 1)
        batch = Batch(micro * ranks, micro, 1)
    for name, value in zip(names, (batch.total, batch.micro, batch.steps), strict=True):
        draft.derive(name, value)
    given = draft.user("batch_size")
    if given is not None and given != batch.micro:
        what = f"train_micro_batch_size_per_gpu = {batch.micro} means the same"
        raise ConfigError.of(what, key="batch_size", value=given, remedy="leave batch_size out")
    draft.derive("batch_size", batch.micro)


STEPS: tuple[Callable[[Completion], None], ...] = (
    _required,
    _layout,
    _model,
    _precision,
    _zero,
    _optimizer,
    _clipping,
    _schedule,
    _data,
    _generation,
    _batch,
)
"""In this order: later steps read what earlier ones derived."""
