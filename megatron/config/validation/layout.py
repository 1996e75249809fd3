"""Rules for the parallel axes and ZeRO."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.derived.attention import layer_classes
from megatron.config.derived.pipe_layout import pipe_layout
from megatron.errors import ConfigIssue
from megatron.registry import GATED_DELTA_NET
from megatron.registry.attention import SOFTMAX_KEYS
from megatron.sequence_parts import ULYSSES

MOST_EXPANSION = 10_000
"""Largest expansion_factor."""


def layout_divides_world(config: Config) -> Iterator[ConfigIssue]:
    """The product pipe x model x context must divide the world size."""
    axes = config.parallelism
    stages = max(1, axes.pipe_parallel_size)
    for name in ("pipe_parallel_size", "model_parallel_size", "context_parallel_size"):
        if getattr(axes, name) < 0 or (name != "pipe_parallel_size" and getattr(axes, name) < 1):
            yield ConfigIssue("a parallel size cannot be this small", key=name, value=getattr(axes, name))
            return
    share = stages * axes.model_parallel_size * axes.context_parallel_size
    assert axes.world_size is not None
    if axes.world_size % share:
        product = f"{stages} x {axes.model_parallel_size}"
        names = "pipe_parallel_size x model_parallel_size"
        if axes.context_parallel_size > 1:
            product, names = f"{product} x {axes.context_parallel_size}", f"{names} x context_parallel_size"
        yield ConfigIssue(
            f"the world size does not divide by {names} = {product} = {share}",
            key="world_size",
            value=axes.world_size,
            hint=f"run on a multiple of {share} ranks, or choose smaller sizes; "
            f"--global-num-gpus {share} plans for machines that are not here",
        )


def stages_hold_layers(config: Config) -> Iterator[ConfigIssue]:
    """Every pipeline stage has a block, and the partition method exists."""
    axes, layers = config.parallelism, config.model.num_layers
    assert layers
    if axes.pipe_parallel_size > layers:
        yield ConfigIssue(f"there are only {layers} blocks", key="pipe_parallel_size", value=axes.pipe_parallel_size)
    method = axes.pipe_partition_method
    if isinstance(method, tuple):
        yield from _blocks_fit_stages(method, pipe_layout(config).stages, layers)
    elif method.lower() not in {"uniform", "parameters"} and not _is_type_method(method.lower()):
        yield ConfigIssue(
            "there is no such method",
            key="pipe_partition_method",
            value=method,
            hint="write uniform, parameters, type: and a regular expression, or a list of blocks",
        )
    elif axes.pipe_parallel_size > 1 and method.lower().startswith("type:"):
        kinds = tuple(map(str, config.model.attention_config or ()))
        yield from _method_matches_a_layer(method, layer_classes(layers, kinds))


def _method_matches_a_layer(method: str, classes: list[str]) -> Iterator[ConfigIssue]:
    """The regular expression matches some layer class."""
    expression = method.partition(":")[2]
    if not expression or not any(re.search(expression, name, re.IGNORECASE) for name in classes):
        yield ConfigIssue(
            "no layer of this model is of such a class",
            key="pipe_partition_method",
            value=method,
            hint=f"the classes are {', '.join(dict.fromkeys(classes))}; type:transformer means the blocks",
        )


def _blocks_fit_stages(blocks: tuple[int, ...], stages: int, layers: int) -> Iterator[ConfigIssue]:
    """The first stage has the embedding and the last the output layer, so these may go without a block."""
    if len(blocks) != stages or sum(blocks) != layers or min(blocks) < 0 or 0 in blocks[1:-1]:
        yield ConfigIssue(
            f"this does not assign {layers} blocks to {stages} stages",
            key="pipe_partition_method",
            value=list(blocks),
            hint="give a number of blocks for each stage; only the first and the last may have none",
        )


def _is_type_method(method: str) -> bool:
    try:
        re.compile(method.removeprefix("type:"))
    except re.error:
        return False
    return method.startswith("type:")


def vocabulary_divides_ranks(config: Config) -> Iterator[ConfigIssue]:
    """A given padded vocabulary divides by the tensor parallel size."""
    padded, ranks = config.tokenizer.padded_vocab_size, config.parallelism.model_parallel_size
    if padded is not None and ranks > 0 and padded % ranks:
        yield ConfigIssue(f"model_parallel_size = {ranks} does not divide it", key="padded_vocab_size", value=padded)


def heads_divide_ranks(config: Config) -> Iterator[ConfigIssue]:
    """Every tensor parallel rank has the same number of query heads and of key heads."""
    heads, ranks = config.model.num_attention_heads, config.parallelism.model_parallel_size
    kv_heads = config.model.num_kv_heads
    assert heads is not None
    assert kv_heads is not None
    if not _any_block(config, beside={"mamba", "mamba2", "gmlp", "amlp", "mlp", GATED_DELTA_NET}):
        return
    if ranks > 0 and heads % ranks:
        yield ConfigIssue(f"model_parallel_size = {ranks} does not divide it", key="num_attention_heads", value=heads)
    if kv_heads < 1 or heads % kv_heads:
        yield ConfigIssue(f"it does not divide num_attention_heads = {heads}", key="num_kv_heads", value=kv_heads)
    elif kv_heads != heads and ranks > 0:
        yield from _ranks_share_key_heads(config, kv_heads, ranks)


def _ranks_share_key_heads(config: Config, kv_heads: int, ranks: int) -> Iterator[ConfigIssue]:
    """A rank has key heads of its own, or the same number of ranks shares each of them."""
    size = config.model.kv_channels or 0
    if kv_heads % ranks == 0:
        return
    if ranks % kv_heads:
        yield ConfigIssue(
            f"model_parallel_size = {ranks} neither divides it nor is a multiple of it",
            key="num_kv_heads",
            value=kv_heads,
            hint=f"with {kv_heads} key heads use a number of ranks that divides {kv_heads}, or a multiple",
        )
    elif size % (ranks // kv_heads):
        yield ConfigIssue(
            f"{ranks // kv_heads} tensor parallel ranks share each key head, whose {size} features do "
            "not divide by them",
            key="num_kv_heads",
            value=kv_heads,
            hint="use fewer tensor parallel ranks",
        )


def _any_block(config: Config, *, beside: set[str]) -> bool:
    """Returns whether there are blocks of other kinds than these."""
    return bool(set(map(str, config.model.attention_config or ())) - beside)


def _has_plain_width(config: Config) -> bool:
    """Returns whether a block has the model's inner width: any but Mamba, RWKV, and experts of a width of their own."""
    own = config.moe.moe_ffn_hidden_size is not None
    return any(
        kind not in {"mamba", "mamba2", "rwkv", "attention"} and not (own and config.moe.has_experts(number))
        for number, kind in enumerate(map(str, config.model.attention_config or ()))
    )


def mlp_width_divides_ranks(config: Config) -> Iterator[ConfigIssue]:
    """The MLP's inner width divides by the tensor parallel size; only one of its two keys may be given."""
    model, ranks = config.model, config.parallelism.model_parallel_size
    if model.intermediate_size is not None and model.expansion_factor is not None:
        yield ConfigIssue(
            f"intermediate_size = {model.intermediate_size} says the same width",
            key="expansion_factor",
            value=model.expansion_factor,
            hint="leave one of the two out",
        )
    elif model.expansion_factor is not None and abs(model.expansion_factor) > MOST_EXPANSION:
        yield ConfigIssue(f"at most {MOST_EXPANSION:,}", key="expansion_factor", value=model.expansion_factor)
    elif model.mlp_multiple_of < 1:
        yield ConfigIssue("it must be at least 1", key="mlp_multiple_of", value=model.mlp_multiple_of)
    elif model.mlp_width < 1:
        key = "intermediate_size" if model.intermediate_size is not None else "expansion_factor"
        yield ConfigIssue("the MLP would have no width", key=key, value=getattr(model, key))
    elif ranks > 0 and model.mlp_width % ranks and _has_plain_width(config):
        key = "intermediate_size" if model.intermediate_size is not None else "hidden_size"
        yield ConfigIssue(
            f"the MLP's inner width is {model.mlp_width}, which model_parallel_size = {ranks} does not divide",
            key=key,
            value=getattr(model, key),
            hint=f"set mlp_multiple_of to a multiple of {ranks}",
        )


def pipeline_limits_zero(config: Config) -> Iterator[ConfigIssue]:
    """DeepSpeed's pipeline engine needs full gradients, which ZeRO 2 and 3 shard."""
    stage = config.deepspeed.zero_stage
    if config.parallelism.pipe_parallel_size >= 1 and stage in (2, 3):
        yield ConfigIssue(
            f"the pipeline engine (pipe_parallel_size = {config.parallelism.pipe_parallel_size}) "
            f"does not work with ZeRO stage {stage}",
            key="zero_optimization",
            value=config.deepspeed.zero_optimization,
            hint="use stage 0 or 1, or pipe_parallel_size: 0",
        )


def context_divides_sequences(config: Config) -> Iterator[ConfigIssue]:
    """Context parallel ranks have equal shards of sequences, and exchange complete heads, or form a ring."""
    size = config.parallelism.context_parallel_size
    if size <= 1:
        return
    yield from _key_heads_divide(config, size)
    yield from _sequence_divides(config, "context_parallel_size")


def _key_heads_divide(config: Config, size: int) -> Iterator[ConfigIssue]:
    """Without a ring every context parallel rank has the same number of key heads."""
    axes, model = config.parallelism, config.model
    assert model.num_kv_heads is not None
    heads = max(1, model.num_kv_heads // max(1, axes.model_parallel_size))
    if axes.context_parallel_method == ULYSSES and heads % size:
        yield ConfigIssue(
            f"the {heads} key heads of a tensor parallel rank do not divide by it",
            key="context_parallel_size",
            value=size,
            hint="with context_parallel_method: ulysses each context parallel rank takes the same number of key heads; "
            "ring and both take any number of ranks",
        )


def ring_is_supported(config: Config) -> Iterator[ConfigIssue]:
    """A ring has attention of its own, without dropout of probabilities and without the packages' kernels."""
    model, engine = config.model, config.transformer_engine
    assert model.num_kv_heads is not None
    if config.parallelism.context_parallel_size <= 1 or config.parallelism.ring_size(model.num_kv_heads) <= 1:
        return
    method = config.parallelism.context_parallel_method
    asked = {"te_mha": engine.te_mha, **{key: getattr(config.kernels, key) for key in SOFTMAX_KEYS}}
    asked["attention_dropout"] = model.attention_dropout > 0 and model.attention_dropout
    asked["attn_logit_softcapping"] = model.attn_logit_softcapping
    lacking = {"attention_dropout": "dropout", "attn_logit_softcapping": "bound of scores"}
    for key, value in asked.items():
        if value:
            yield ConfigIssue(
                f"ring attention (context_parallel_method: {method}) has no such " + lacking.get(key, "kernel"),
                key=key,
                value=value,
                hint="leave it out, or use context_parallel_method: ulysses",
            )


def sequence_parallel_needs_tensor_parallel(config: Config) -> Iterator[ConfigIssue]:
    """Sequence parallelism shards the sequence over the tensor parallel ranks."""
    axes = config.parallelism
    if not axes.sequence_parallel:
        return
    if axes.model_parallel_size == 1:
        yield ConfigIssue(
            "there are no tensor parallel ranks to shard the sequence over (model_parallel_size = 1)",
            key="sequence_parallel",
            value=True,
            hint="raise model_parallel_size, or leave it out",
        )
    else:
        yield from _sequence_divides(config, "sequence_parallel")


def _sequence_divides(config: Config, key: str) -> Iterator[ConfigIssue]:
    """The sequences divide into the shards of both kinds of parallelism, and into the chunks of a ring."""
    axes, length, heads = config.parallelism, config.model.seq_length, config.model.num_kv_heads
    assert length is not None
    assert heads is not None
    if min(axes.context_parallel_size, axes.model_parallel_size) < 1:
        return  # another rule reports it
    given = axes if key == "sequence_parallel" else axes.model_copy(update={"sequence_parallel": False})
    parts = given.length_multiple(heads, zigzag=not config.model.in_order)
    if parts > 0 and length % parts:
        below = length - length % parts
        nearest = f"{below} or {below + parts}" if below else f"{parts}"
        yield ConfigIssue(
            f"seq_length = {length} does not divide into {parts} parts",
            key=key,
            value=getattr(axes, key),
            hint=f"make seq_length a multiple of {parts}, such as {nearest}",
        )
