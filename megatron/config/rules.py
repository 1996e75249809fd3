"""Rules across sections. Each is a function of the whole Config that yields the mistakes it finds.

All rules are applied and every violation is reported at once. A rule speaks of what can never work; what is only
not built yet stands in `support.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron.config.complete import INFERENCE_SCRIPTS
from megatron.config.config import Config
from megatron.errors import Mistake

Rule = Callable[[Config], Iterator[Mistake]]


def deepspeed_is_on(config: Config) -> Iterator[Mistake]:
    """There is no other engine."""
    if not config.deepspeed.deepspeed:
        yield Mistake(
            "training always runs through DeepSpeed", key="deepspeed", value=False, remedy="leave the key out"
        )


def layout_divides_world(config: Config) -> Iterator[Mistake]:
    """The product pipe x model x context must divide the world size."""
    axes = config.parallelism
    stages = max(1, axes.pipe_parallel_size)
    for name in ("pipe_parallel_size", "model_parallel_size", "context_parallel_size"):
        if getattr(axes, name) < 0 or (name != "pipe_parallel_size" and getattr(axes, name) < 1):
            yield Mistake("a parallel size cannot be this small", key=name, value=getattr(axes, name))
            return
    share = stages * axes.model_parallel_size * axes.context_parallel_size
    assert axes.world_size is not None
    if axes.world_size % share:
        product = f"{stages} x {axes.model_parallel_size}"
        names = "pipe_parallel_size x model_parallel_size"
        if axes.context_parallel_size > 1:
            product, names = f"{product} x {axes.context_parallel_size}", f"{names} x context_parallel_size"
        yield Mistake(
            f"the world size does not divide by {names} = {product} = {share}",
            key="world_size",
            value=axes.world_size,
            remedy=f"run on a multiple of {share} ranks, or choose smaller sizes",
        )


def heads_divide_hidden(config: Config) -> Iterator[Mistake]:
    """Without kv_channels, every head has hidden_size / num_attention_heads features."""
    model = config.model
    assert model.hidden_size and model.num_attention_heads
    if model.kv_channels is not None and model.kv_channels < 1:
        yield Mistake("a head needs at least one feature", key="kv_channels", value=model.kv_channels)
    elif (
        model.kv_channels == model.hidden_size // model.num_attention_heads
        and model.hidden_size % model.num_attention_heads
        and "mamba" not in (model.attention_config or ())
    ):
        yield Mistake(
            f"num_attention_heads = {model.num_attention_heads} does not divide it",
            key="hidden_size",
            value=model.hidden_size,
            remedy="change one of the two, or give kv_channels, the width of a head",
        )


def heads_divide_ranks(config: Config) -> Iterator[Mistake]:
    """Tensor parallel ranks hold whole heads, of queries and of keys."""
    heads, ranks = config.model.num_attention_heads, config.parallelism.model_parallel_size
    kv_heads = config.model.num_kv_heads
    assert heads is not None
    assert kv_heads is not None
    if ranks > 0 and heads % ranks:
        yield Mistake(f"model_parallel_size = {ranks} does not divide it", key="num_attention_heads", value=heads)
    if kv_heads < 1 or heads % kv_heads:
        yield Mistake(f"it does not divide num_attention_heads = {heads}", key="num_kv_heads", value=kv_heads)
    elif kv_heads != heads and ranks > 0 and kv_heads % ranks:
        yield Mistake(
            f"model_parallel_size = {ranks} does not divide it",
            key="num_kv_heads",
            value=kv_heads,
            remedy=f"at most {kv_heads} tensor parallel ranks can share {kv_heads} key heads",
        )


def grouped_heads_need_dense_attention(config: Config) -> Iterator[Mistake]:
    """Fewer key heads than query heads works with global and flash attention only."""
    model = config.model
    if model.num_kv_heads == model.num_attention_heads:
        return
    others = sorted({str(kind) for kind in model.attention_config or ()} - {"global", "flash"})
    if others or model.sparsity_config:
        what = f"attention of kind {', '.join(others)}" if others else "sparsity_config"
        yield Mistake(f"{what} needs as many key heads as query heads", key="num_kv_heads", value=model.num_kv_heads)


def mlp_width_divides_ranks(config: Config) -> Iterator[Mistake]:
    """The MLP's inner width is cut evenly; only one of its two sizes may be given."""
    model, ranks = config.model, config.parallelism.model_parallel_size
    if model.intermediate_size is not None and model.expansion_factor is not None:
        yield Mistake(
            f"intermediate_size = {model.intermediate_size} says the same width",
            key="expansion_factor",
            value=model.expansion_factor,
            remedy="leave one of the two out",
        )
    elif model.mlp_multiple_of < 1:
        yield Mistake("it must be at least 1", key="mlp_multiple_of", value=model.mlp_multiple_of)
    elif model.mlp_width < 1:
        key = "intermediate_size" if model.intermediate_size is not None else "expansion_factor"
        yield Mistake("the MLP would have no width", key=key, value=getattr(model, key))
    elif ranks > 0 and model.mlp_width % ranks:
        key = "intermediate_size" if model.intermediate_size is not None else "hidden_size"
        yield Mistake(
            f"the MLP's inner width is {model.mlp_width}, which model_parallel_size = {ranks} does not divide",
            key=key,
            value=getattr(model, key),
            remedy=f"set mlp_multiple_of to a multiple of {ranks}",
        )


def positions_cover_sequence(config: Config) -> Iterator[Mistake]:
    """Every token of a sequence needs a position."""
    model = config.model
    assert model.max_position_embeddings is not None
    assert model.seq_length is not None
    if model.max_position_embeddings < model.seq_length:
        yield Mistake(
            f"it is less than seq_length = {model.seq_length}",
            key="max_position_embeddings",
            value=model.max_position_embeddings,
            remedy="raise it, or shorten seq_length",
        )


def rotary_turns_pairs(config: Config) -> Iterator[Mistake]:
    """Rotary positions turn pairs of features, on the first rotary_pct of each head."""
    model = config.model
    if model.pos_emb != "rotary" or model.kv_channels is None:
        return
    turned = int(model.kv_channels * model.rotary_pct)
    if not 0 < model.rotary_pct <= 1:
        yield Mistake("it must be above 0 and at most 1", key="rotary_pct", value=model.rotary_pct)
    elif turned % 2 or turned == 0:
        yield Mistake(
            f"it turns {turned} of the {model.kv_channels} features of a head, which is not a number of pairs",
            key="rotary_pct",
            value=model.rotary_pct,
        )


def fractions_are_fractions(config: Config) -> Iterator[Mistake]:
    """Probabilities and shares lie in [0, 1]."""
    sections = (config.model, config.schedule, config.generation)
    names = ("hidden_dropout", "attention_dropout", "warmup", "lr_decay_fraction", "top_p", "min_p")
    for section in sections:
        for name in names:
            value = getattr(section, name, None)
            if value is not None and not 0 <= value <= 1:
                yield Mistake("it must lie between 0 and 1", key=name, value=value)


def counts_are_positive(config: Config) -> Iterator[Mistake]:
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
        "exit_interval",
        "gpu_memory",
        "steps_per_print",
        "rotary_emb_base",
    ):
        value = values[name]
        if value is not None and value <= 0:
            yield Mistake("it must be more than 0", key=name, value=value)
    for name in (
        "weight_decay",
        "gradient_clipping",
        "min_lr",
        "lr",
        "eval_iters",
        "num_workers",
        "temperature",
        "top_k",
    ):
        value = values[name]
        if value is not None and value < 0:
            yield Mistake("it cannot be negative", key=name, value=value)


def pipeline_limits_zero(config: Config) -> Iterator[Mistake]:
    """DeepSpeed's pipeline engine keeps whole gradients, which ZeRO 2 and 3 partition."""
    stage = config.deepspeed.zero_stage
    if config.parallelism.pipe_parallel_size >= 1 and stage in (2, 3):
        yield Mistake(
            f"the pipeline engine (pipe_parallel_size = {config.parallelism.pipe_parallel_size}) "
            f"does not work with ZeRO stage {stage}",
            key="zero_optimization",
            value=config.deepspeed.zero_optimization,
            remedy="use stage 0 or 1, or pipe_parallel_size: 0",
        )


def bfloat16_needs_zero(config: Config) -> Iterator[Mistake]:
    """DeepSpeed accumulates bfloat16 gradients in fp32 from ZeRO 1 on only."""
    accumulate = (config.precision.data_types or {}).get("grad_accum_dtype")
    if config.precision.precision == "bfloat16" and config.deepspeed.zero_stage == 0 and accumulate == "fp32":
        yield Mistake(
            "bfloat16 with gradients accumulated in fp32 needs ZeRO",
            key="zero_optimization",
            value=config.deepspeed.zero_optimization,
            remedy="set stage: 1",
        )


def fp16_loss_needs_fp16(config: Config) -> Iterator[Mistake]:
    """The loss can be computed in fp16 only where the logits are fp16."""
    if config.kernels.fp16_lm_cross_entropy and config.precision.precision != "fp16":
        yield Mistake(
            f"the precision is {config.precision.precision}",
            key="fp16_lm_cross_entropy",
            value=True,
            remedy="leave it out",
        )


def experts_limit_zero(config: Config) -> Iterator[Mistake]:
    """Experts are parameters of their own groups, which ZeRO 3 does not know; tokens choose among what exists."""
    moe = config.moe
    if moe.moe_num_experts > 1 and config.deepspeed.zero_stage == 3:
        stage = config.deepspeed.zero_optimization
        yield Mistake(
            "experts do not work with ZeRO 3", key="zero_optimization", value=stage, remedy="use stage 0, 1 or 2"
        )
    if moe.moe_top_k > moe.moe_num_experts > 1:
        yield Mistake(f"there are {moe.moe_num_experts} experts", key="moe_top_k", value=moe.moe_top_k)


def learning_rates_are_ordered(config: Config) -> Iterator[Mistake]:
    """The floor of the schedule is not above its peak; the schedule has one source on resuming."""
    rate, floor = config.optimizer.lr, config.schedule.min_lr
    if rate is not None and floor > rate:
        yield Mistake(f"it is above the learning rate {rate}", key="min_lr", value=floor)
    if config.schedule.override_lr_scheduler and config.schedule.use_checkpoint_lr_scheduler:
        yield Mistake(
            "override_lr_scheduler asks for the opposite",
            key="use_checkpoint_lr_scheduler",
            value=True,
            remedy="keep one",
        )


def saving_is_scheduled(config: Config) -> Iterator[Mistake]:
    """`save` says where; checkpoint_factor or extra_save_iters say when."""
    saving = config.checkpoint
    factor = saving.checkpoint_factor
    if _trains(config) and saving.save is not None and factor is None and saving.extra_save_iters is None:
        yield Mistake(
            "nothing says when to save",
            key="save",
            value=saving.save,
            remedy="give checkpoint_factor (steps between checkpoints) or extra_save_iters",
        )
    if factor is None:
        return
    if saving.checkpoint_scale == "linear" and (factor < 1 or factor != int(factor)):
        yield Mistake(
            "with checkpoint_scale linear it is a whole number of steps", key="checkpoint_factor", value=factor
        )
    if saving.checkpoint_scale == "log" and factor <= 1:
        yield Mistake("with checkpoint_scale log it must be more than 1", key="checkpoint_factor", value=factor)


def loading_is_possible(config: Config) -> Iterator[Mistake]:
    """`finetune` and `iteration` speak of a checkpoint, which `load` names."""
    saved = config.checkpoint
    if saved.load is None and saved.finetune:
        yield Mistake("nothing is loaded", key="finetune", value=True, remedy="give load, the folder of the checkpoint")


def run_has_a_length(config: Config) -> Iterator[Mistake]:
    """One of train_iters, train_epochs and train_samples."""
    if not _trains(config):
        return
    names = ("train_iters", "train_epochs", "train_samples")
    given = [name for name in names if getattr(config.training, name) is not None]
    if not given:
        yield Mistake("the length of the run is not given", key="train_iters", remedy="give train_iters")
    if len(given) > 1:
        yield Mistake(f"{' and '.join(given)} are both given", key=given[1], remedy="keep one of them")
    for name in given:
        value = getattr(config.training, name)
        if value < 0 or (value == 0 and name != "train_iters"):
            yield Mistake("a run cannot have this length", key=name, value=value)


def data_has_one_source(config: Config) -> Iterator[Mistake]:
    """Either data_path, which `split` cuts, or lists of paths."""
    data = config.data
    lists = {f"{split}_data_paths": getattr(data, f"{split}_data_paths") for split in ("train", "valid", "test")}
    given = [name for name, paths in lists.items() if paths is not None]
    if data.data_path is not None and given:
        yield Mistake(
            f"{given[0]} is given as well", key="data_path", value=data.data_path, remedy="keep one of the two"
        )
    elif data.train_label_data_paths is not None and data.train_data_paths is None:
        yield Mistake("there are no train_data_paths that it labels", key="train_label_data_paths")
    if given and lists["train_data_paths"] is None and _trains(config):
        yield Mistake("there are no train_data_paths beside it", key=given[0], value=list(lists[given[0]] or ()))


def lists_are_as_long_as_their_paths(config: Config) -> Iterator[Mistake]:
    """Weights, labels and rewards go with paths one by one."""
    data = config.data
    for split in ("train", "valid", "test"):
        paths = getattr(data, f"{split}_data_paths") or getattr(data, f"pos_{split}_data_paths")
        count = len(paths or ())
        for name in (f"{split}_data_weights", f"{split}_label_data_paths", f"{split}_reward_data_paths"):
            values = getattr(data, name)
            if values is not None and paths is not None and len(values) != count:
                yield Mistake(f"it has {len(values)} items for {count} data sets", key=name, value=list(values))
        weights = getattr(data, f"{split}_data_weights") or ()
        if any(weight < 0 for weight in weights) or (weights and sum(weights) <= 0):
            yield Mistake("weights are not negative and not all zero", key=f"{split}_data_weights", value=list(weights))


def split_is_readable(config: Config) -> Iterator[Mistake]:
    """`split` holds up to three shares, separated by commas or slashes."""
    text = config.data.split
    try:
        shares = [float(share) for share in text.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
        yield Mistake("this is not three shares", key="split", value=text, remedy="write 969,30,1 or the like")


def _trains(config: Config) -> bool:
    script = config.launch.user_script
    return script is None or Path(script).name not in INFERENCE_SCRIPTS


RULES: tuple[Rule, ...] = (
    deepspeed_is_on,
    layout_divides_world,
    heads_divide_hidden,
    heads_divide_ranks,
    grouped_heads_need_dense_attention,
    mlp_width_divides_ranks,
    positions_cover_sequence,
    rotary_turns_pairs,
    fractions_are_fractions,
    counts_are_positive,
    pipeline_limits_zero,
    bfloat16_needs_zero,
    fp16_loss_needs_fp16,
    experts_limit_zero,
    learning_rates_are_ordered,
    saving_is_scheduled,
    loading_is_possible,
    run_has_a_length,
    data_has_one_source,
    lists_are_as_long_as_their_paths,
    split_is_readable,
)


def violations(config: Config) -> list[Mistake]:
    """Every mistake that any rule finds."""
    return [mistake for rule in RULES for mistake in rule(config)]
