"""Computes derived configuration values; the arithmetic is in the other files of this folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron.config.cluster import Resources
from megatron.config.derived.adapters import derive_lora, derive_soft_prompt
from megatron.config.derived.attention import TYPES, expand_attention, expand_types
from megatron.config.derived.batch import (
    ACCUMULATION_STEPS,
    MICRO,
    TOTAL,
    BatchSizes,
    derive_batch,
    size_issues,
)
from megatron.config.derived.draft import ConfigDraft
from megatron.config.derived.encoder import CONVERSION, ENCODER_KEYS, derive_encoder
from megatron.config.derived.encoder_decoder import MOST_WORDS, PARTS, SPANS, derive_sums
from megatron.config.derived.grad_accum_dtype import derive_data_types
from megatron.config.derived.lr_schedule import decay_horizon
from megatron.config.derived.mlp_width import HEAD_KEYS, head_dim
from megatron.config.derived.mup import read_base_shapes
from megatron.config.derived.optimizer import derive_optimizer, params_without_effect
from megatron.config.derived.precision import (
    bf16_block,
    derive_precision,
    fp16_block,
)
from megatron.config.derived.retrieval import DPR, ICT, RETRIEVAL_SCRIPTS, require_dpr_format
from megatron.config.derived.task import CLASSES, TASK_KEYS, derive_task
from megatron.config.derived.zero import derive_zero
from megatron.config.validation.unknown_values import UnresolvedValue
from megatron.errors import ConfigError, ConfigIssue
from megatron.expert_blocks import has_experts
from megatron.registry import OPTIMIZERS, WITHOUT_MLP

MOST_LAYERS = 10_000
INFERENCE_SCRIPTS = frozenset(
    {
        CONVERSION,
        "generate.py",
        "evaluate.py",
        "eval.py",
        "run_text_generation_server.py",
        "bits_per_byte.py",
        "perplexity.py",
        *RETRIEVAL_SCRIPTS,
    }
)

ZERO_OUTPUTS = ("stage", "reduce_scatter", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size")


def trains(user_script: str | None) -> bool:
    """Returns whether the script trains, so that batch, optimizer and length are required."""
    return user_script is None or Path(user_script).name not in INFERENCE_SCRIPTS


def fill_defaults(
    values: Mapping[str, Any], given: Collection[str], resources: Resources | None, unknown: Collection[str] = ()
) -> ConfigDraft:
    """Runs every derivation on the values and collects their errors.

    Args:
        values: every key and its value.
        given: the keys that the user wrote.
        resources: of the cluster; None where they could not be found.
        unknown: keys whose value is invalid. Values that depend on them become unknown too.
    """
    draft = ConfigDraft(dict(values), given, resources, set(unknown))
    for step, fills in DERIVATIONS:
        draft.settled = set()
        try:
            step(draft)
        except ConfigError as error:
            draft.refuse(*error.issues)
        except UnresolvedValue:
            pass
        else:
            continue
        draft.unknown |= fills - draft.settled
    return draft


def _encoder_decoder(draft: ConfigDraft) -> None:
    if draft["train_impl"] != SPANS:
        return
    names = [*PARTS, *(name for names in PARTS.values() for name in names), "max_position_embeddings"]
    for name, value in derive_sums({name: draft[name] for name in names}).items():
        draft.derive(name, value)
    if "mask_max_ngram" not in draft.given:
        draft.derive("mask_max_ngram", MOST_WORDS)


def _sequence(draft: ConfigDraft) -> None:
    """Takes seq_length from max_position_embeddings, as for imported models."""
    if draft["seq_length"] is None and draft["max_position_embeddings"] is not None:
        draft.derive("seq_length", draft["max_position_embeddings"])


def _required(draft: ConfigDraft) -> None:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        if not draft.knows(name):
            continue
        if draft[name] is None:
            draft.refuse(ConfigIssue("the key is not given", key=name, hint="every model needs it"))
        elif draft[name] < 1:
            draft.refuse(ConfigIssue("this must be at least 1", key=name, value=draft[name]))
    if draft.knows("num_layers") and draft["num_layers"] > MOST_LAYERS:
        draft.refuse(ConfigIssue(f"at most {MOST_LAYERS:,}", key="num_layers", value=draft["num_layers"]))


def _world(draft: ConfigDraft) -> None:
    if draft.resources is None:
        raise UnresolvedValue("world_size")
    requested, found = draft.user("world_size"), draft.resources.world_size
    if requested not in (None, found):
        draft.warnings.append(f"world_size = {requested!r}: has no effect; {found} is what the machines offer")
    draft.derive("world_size", found)
    if draft.resources.accelerator == "cpu" and draft["distributed_backend"] == "nccl":
        draft.derive("distributed_backend", "gloo")


def _launcher(draft: ConfigDraft) -> None:
    if draft["deepspeed_slurm"] or draft["launcher"] == "slurm":
        return
    if draft["comment"] is not None:
        draft.warnings.append("comment: has no effect, since only srun takes it")
    if draft["account"] is not None:
        draft.warnings.append("account: has no effect, since only srun takes it")


def _tensor_ranks(draft: ConfigDraft) -> None:
    if draft["model_parallel_size"] == 0:
        draft.derive("model_parallel_size", 1)


def _pipeline(draft: ConfigDraft) -> None:
    draft.derive("is_pipe_parallel", draft["pipe_parallel_size"] >= 1)


def _positions(draft: ConfigDraft) -> None:
    if draft["max_position_embeddings"] is None:
        draft.derive("max_position_embeddings", draft["seq_length"])


def _key_heads(draft: ConfigDraft) -> None:
    if draft["num_kv_heads"] is None:
        draft.derive("num_kv_heads", draft["num_attention_heads"])


def _head_width(draft: ConfigDraft) -> None:
    if draft["kv_channels"] is None:
        draft.derive("kv_channels", head_dim({name: draft[name] for name in HEAD_KEYS}))


def _attention(draft: ConfigDraft) -> None:
    draft.derive("attention_config", expand_attention(draft["attention_config"], draft["num_layers"]))
    draft.derive(TYPES, expand_types(draft[TYPES], draft["num_layers"]))


def _encoder(draft: ConfigDraft) -> None:
    for name, value in derive_encoder(draft["train_impl"], {name: draft[name] for name in ENCODER_KEYS}).items():
        draft.derive(name, value)


def _task(draft: ConfigDraft) -> None:
    if draft["train_impl"] != CLASSES:
        return
    files = (*(draft["task_train_data"] or ()), *(draft["task_valid_data"] or ()))
    given = {name: draft[name] for name in TASK_KEYS}
    for name, value in derive_task(given, draft["num_classes"], files).items():
        draft.derive(name, value)


def _retrieval(draft: ConfigDraft) -> None:
    if draft["train_impl"] == DPR:
        draft.derive("task_format", require_dpr_format(draft["task_format"]))
    elif draft["train_impl"] == ICT:
        draft.derive("pack_impl", "unpacked")


def _adapters(draft: ConfigDraft) -> None:
    kinds = [str(kind) for kind in draft["attention_config"] or ()]
    dense = any(kind not in WITHOUT_MLP and not _has_experts(draft, block) for block, kind in enumerate(kinds))
    gated = bool(draft["attention_output_gate"])
    of_model = partial(derive_lora, gated=gated, kinds=set(kinds), dense=dense)
    for name, derive in (("lora", of_model), ("soft_prompt_tuning", derive_soft_prompt)):
        requested = draft[name] if draft.knows(name) else None
        draft.derive(name, derive(requested))
        if requested is not None and draft[name] is not None and trains(draft["user_script"]) and draft["load"] is None:
            draft.warnings.append(f"{name}: load is not set, so what stays frozen are random weights")


def _has_experts(draft: ConfigDraft, block: int) -> bool:
    if (draft["moe_num_experts"] or 1) == 1:
        return False
    return has_experts(
        block,
        interval=draft["moe_expert_interval"],
        first_dense=draft["moe_first_k_dense_replace"],
        listed=draft["moe_layer_freq"],
    )


def _precision(draft: ConfigDraft) -> None:
    precision = derive_precision(draft["precision"], draft["fp16"], draft["bf16"])
    draft.derive("precision", precision)
    draft.derive("fp16", fp16_block(precision, draft["fp16"]))
    draft.derive("bf16", bf16_block(precision, draft["bf16"]))
    draft.derive("data_types", derive_data_types(precision, draft["data_types"]))


def _loss_scale(draft: ConfigDraft) -> None:
    draft.derive("dynamic_loss_scale", draft["loss_scale"] is None)


def _zero(draft: ConfigDraft) -> None:
    block, tuned = draft["zero_optimization"], draft["autotuning"] is not None
    precision = "" if block is not None and not draft.knows("precision") else draft["precision"]
    zero = derive_zero(precision, block, tuned=tuned)
    if block is not None and block.get("stage") == 0 and zero["stage"] == 1:
        draft.warnings.append(
            f"zero_optimization = {{stage: 0}}: runs as stage 1, since DeepSpeed sums {precision} gradients in fp32 "
            "from there on; the optimizer state is sharded over the data-parallel ranks, and no result changes"
        )
    if block is None and draft["moe_expert_parallel_size"] > 1:  # DeepSpeed requires it with expert parallelism
        zero = {**zero, "contiguous_gradients": True}
    draft.derive("zero_optimization", zero)
    for name in ZERO_OUTPUTS:
        draft.derive(f"zero_{name}", _as_output(name, zero.get(name)))


def _as_output(name: str, value: Any) -> Any:
    """Returns the value in the type of its output key; None for another type, which DeepSpeed checks."""
    if name in {"reduce_scatter", "contiguous_gradients"}:
        return value if isinstance(value, bool) else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if name == "stage" and isinstance(value, (list, str)):
        return tuple(value) if isinstance(value, list) else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _optimizer(draft: ConfigDraft) -> None:
    block = draft["optimizer"]
    kind, rate = (draft.user(name) if draft.knows(name) else None for name in ("optimizer_type", "lr"))
    if block is None and not draft.knows("optimizer_type", "lr"):
        raise UnresolvedValue("lr")
    if block is None and rate is None and trains(draft["user_script"]):
        draft.warnings.append("optimizer: none is given, so Adam with a learning rate of 0.001 is used")
    choice = derive_optimizer(block, kind, rate, OPTIMIZERS.names)
    for name, why in params_without_effect(choice).items():
        draft.warnings.append(f"optimizer: its parameter {name} has no effect; {why}")
    draft.derive("optimizer", choice.block)
    draft.derive("optimizer_type", choice.kind)
    draft.derive("lr", choice.lr)
    if choice.weight_decay is not None:
        given = draft.user("weight_decay")
        if given is not None and given != choice.weight_decay:
            what = f"optimizer.params says weight_decay = {choice.weight_decay}"
            raise ConfigError.of(what, key="weight_decay", value=given, hint="leave one of the two out")
        draft.derive("weight_decay", choice.weight_decay)


def _base_model(draft: ConfigDraft) -> None:
    if draft["use_mup"] and draft["base_shapes_file"] is not None and not draft["save_base_shapes"]:
        draft.derive("mup_base_widths", read_base_shapes(draft["base_shapes_file"])["widths"])


def _clipping(draft: ConfigDraft) -> None:
    clip, gradient = draft.user("clip_grad"), draft.user("gradient_clipping")
    if clip is not None and gradient is not None and clip != gradient:
        what = f"gradient_clipping = {gradient} means the same"
        raise ConfigError.of(what, key="clip_grad", value=clip, hint="leave clip_grad out")
    if clip is not None and gradient is None:
        draft.derive("gradient_clipping", clip)
    draft.derive("clip_grad", draft["gradient_clipping"])


def _schedule(draft: ConfigDraft) -> None:
    counts_samples = draft["train_samples"] is not None
    name, length = ("lr_decay_samples", "train_samples") if counts_samples else ("lr_decay_iters", "train_iters")
    requested = draft.user(name)
    if requested is not None and requested < 1:
        raise ConfigError.of("it must be more than 0", key=name, value=requested)
    if requested is not None and draft.user("lr_decay_fraction") is not None:
        draft.warnings.append(f"lr_decay_fraction: has no effect, since {name} is given")
    horizon = requested or decay_horizon(draft[length], requested, draft["lr_decay_fraction"])
    draft.derive(name, horizon)


def _weights(weights: str, paths: str, preferred: str) -> Callable[[ConfigDraft], None]:
    def step(draft: ConfigDraft) -> None:
        sets = draft[paths] or draft[preferred]
        if sets and draft[weights] is None:
            draft.derive(weights, (1.0,) * len(sets))

    return step


WEIGHTS = {
    "train_data_weights": ("train_data_paths", "pos_train_data_paths"),
    "valid_data_weights": ("valid_data_paths", "pos_valid_data_paths"),
    "test_data_weights": ("test_data_paths", "pos_test_data_paths"),
}
"""Key of sampling weights -> the keys of data sets, of which one is given."""


def _generation(draft: ConfigDraft) -> None:
    if draft["text_gen_type"] is None:
        draft.derive("text_gen_type", "input-file" if draft["sample_input_file"] else "unconditional")


def _batch(draft: ConfigDraft) -> None:
    share = max(1, draft["pipe_parallel_size"]) * draft["model_parallel_size"] * draft["context_parallel_size"]
    if share < 1 or draft["world_size"] % share:
        raise UnresolvedValue("world_size")  # a rule reports the layout
    ranks = max(1, draft["world_size"] // share)
    if trains(draft["user_script"]):
        batch = _training_batch(draft, ranks)
    else:
        micro = max(1, draft[MICRO] or 1)
        batch = BatchSizes(micro * ranks, micro, 1)
    for name, value in ((TOTAL, batch.total), (MICRO, batch.micro), (ACCUMULATION_STEPS, batch.steps)):
        draft.derive(name, value)
    given = draft.user("batch_size")
    if given is not None and given != batch.micro:
        what = f"train_micro_batch_size_per_gpu = {batch.micro} means the same"
        raise ConfigError.of(what, key="batch_size", value=given, hint="leave batch_size out")
    draft.derive("batch_size", batch.micro)


def _training_batch(draft: ConfigDraft, ranks: int) -> BatchSizes:
    """Derives the batch sizes; with one of them unknown, only checks the other two."""
    names = (TOTAL, MICRO, ACCUMULATION_STEPS)
    total, micro, steps = (draft[name] if draft.knows(name) else None for name in names)
    if not draft.knows(TOTAL):
        ConfigError.raise_any(size_issues(total, micro, steps))
    elif total is not None or draft.knows(*names):
        batch = derive_batch(total, micro, steps, ranks)
        if draft.knows(*names):
            return batch
    raise UnresolvedValue("train_batch_size")


def _fills(*names: str) -> frozenset[str]:
    return frozenset(names)


DERIVATIONS: tuple[tuple[Callable[[ConfigDraft], None], frozenset[str]], ...] = (
    (_encoder_decoder, _fills("num_layers", "seq_length", "max_position_embeddings")),
    (_sequence, _fills("seq_length")),
    (_required, _fills()),
    (_world, _fills("world_size", "distributed_backend")),
    (_launcher, _fills()),
    (_tensor_ranks, _fills("model_parallel_size")),
    (_pipeline, _fills("is_pipe_parallel")),
    (_positions, _fills("max_position_embeddings")),
    (_key_heads, _fills("num_kv_heads")),
    (_head_width, _fills("kv_channels")),
    (_attention, _fills("attention_config", TYPES)),
    (_encoder, _fills(*ENCODER_KEYS)),
    (_task, _fills(*TASK_KEYS, "num_classes")),
    (_retrieval, _fills("task_format", "pack_impl")),
    (_adapters, _fills()),
    (_precision, _fills("precision", "fp16", "bf16", "data_types")),
    (_loss_scale, _fills("dynamic_loss_scale")),
    (_zero, _fills("zero_optimization", *(f"zero_{name}" for name in ZERO_OUTPUTS))),
    (_optimizer, _fills("optimizer", "optimizer_type", "lr", "weight_decay")),
    (_base_model, _fills("mup_base_widths")),
    (_clipping, _fills("gradient_clipping", "clip_grad")),
    (_schedule, _fills("lr_decay_iters")),
    *((_weights(weights, *paths), _fills(weights)) for weights, paths in WEIGHTS.items()),
    (_generation, _fills("text_gen_type")),
    (_batch, _fills(TOTAL, MICRO, ACCUMULATION_STEPS, "batch_size")),
)
"""Derivations in order, since later ones read earlier results, each with the keys that it sets."""
