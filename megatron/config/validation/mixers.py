"""Rules for blocks without attention: Mamba, Mamba-2, RWKV, gMLP, aMLP and gated delta nets."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import ACTIVATIONS, GATED_DELTA_NET, POSITIONS, WITHOUT_ATTENTION

CONVOLVED = 3
"""Positions before its own that the convolution of a Mamba or Mamba-2 block reads."""
MIXES_POSITIONS = ("amlp", "gmlp")
"""Blocks that mix all positions by one matrix."""


def _kinds(config: Config) -> list[str]:
    return sorted(set(map(str, config.model.attention_config or ())) & WITHOUT_ATTENTION)


def mixers_limit_layouts(config: Config) -> Iterator[ConfigIssue]:
    """A gMLP mixes all positions by one matrix; a convolution reads positions of one shard before its own."""
    kinds, size = _kinds(config), config.parallelism.context_parallel_size
    if not kinds:
        return
    mixing = [kind for kind in kinds if kind in MIXES_POSITIONS]
    assert config.model.seq_length
    if size > 1 and mixing:
        yield ConfigIssue(
            f"blocks of kind {', '.join(mixing)} mix all positions by one matrix, so ranks cannot share a sequence",
            key="context_parallel_size",
            value=size,
            hint="use model_parallel_size with sequence_parallel",
        )
    elif size > 1 and {"mamba", "mamba2"} & set(kinds) and _shortest(config) // size < CONVOLVED:
        yield ConfigIssue(
            f"the convolution of a Mamba block reads {CONVOLVED} positions before its own, more than a rank has of "
            f"{_shortest(config)} tokens",
            key="context_parallel_size",
            value=size,
            hint=f"use sequences of at least {CONVOLVED * size} tokens",
        )
    elif size > 1 and GATED_DELTA_NET in kinds and _shortest(config) // size < config.mixers.linear_conv_kernel_dim - 1:
        reads = config.mixers.linear_conv_kernel_dim - 1
        yield ConfigIssue(
            f"the convolution of a gated delta net reads {reads} positions before its own, more than a rank has of "
            f"{_shortest(config)} tokens",
            key="context_parallel_size",
            value=size,
            hint=f"use sequences of at least {reads * size} tokens",
        )
    yield from _attention_has_a_block(config)


def _shortest(config: Config) -> int:
    """Returns the length of the shortest sequences [tokens]."""
    length, block = config.model.seq_length, config.deepspeed.curriculum_learning or {}
    assert length is not None
    settings = block.get("schedule_config")
    listed = settings.get("difficulty") if isinstance(settings, dict) else None
    lengths = listed if isinstance(listed, list) else [block.get("min_difficulty")]
    given = [one for one in lengths if isinstance(one, int) and one > 0] if block.get("enabled", False) else []
    return min([length, *given])


def _attention_has_a_block(config: Config) -> Iterator[ConfigIssue]:
    """Keys of attention need a block with attention."""
    kinds, positions = tuple(map(str, config.model.attention_config or ())), config.model.pos_emb
    attends = set(kinds) - WITHOUT_ATTENTION
    entry = POSITIONS.entry(positions)
    if entry.enters & {"attention", "scores"} and not attends:
        yield ConfigIssue(
            "this changes attention, and no block has any",
            key="pos_emb",
            value=positions,
            hint="use none, learned or sinusoidal",
        )
    elif entry.scores and kinds[0] in WITHOUT_ATTENTION:
        yield ConfigIssue(
            f"the first block holds the table of all blocks, and it is of kind {kinds[0]}",
            key="pos_emb",
            value=positions,
            hint="let the first block have attention",
        )
    heads = config.model.num_kv_heads
    if heads != config.model.num_attention_heads and not attends:
        yield ConfigIssue("no block has attention", key="num_kv_heads", value=heads, hint="leave it out")
    if config.model.attention_dropout > 0 and not attends:
        yield ConfigIssue(
            "no block has attention",
            key="attention_dropout",
            value=config.model.attention_dropout,
            hint="set it to 0",
        )


def mixer_widths_divide(config: Config) -> Iterator[ConfigIssue]:
    """Heads and channels divide by the tensor parallel size."""
    kinds, model, mixers = _kinds(config), config.model, config.mixers
    ranks = config.parallelism.model_parallel_size
    assert model.hidden_size
    assert model.num_attention_heads
    if "rwkv" in kinds:
        width, heads = mixers.dim_att or model.hidden_size, model.num_attention_heads
        if width % heads:
            yield ConfigIssue(f"num_attention_heads = {heads} does not divide it", key="dim_att", value=width)
        elif mixers.head_size not in (None, width // heads):
            yield ConfigIssue(
                f"{heads} heads of {width} features are {width // heads} wide", key="head_size", value=mixers.head_size
            )
        if model.hidden_size % max(1, ranks):
            yield ConfigIssue(
                f"model_parallel_size = {ranks} does not divide it", key="hidden_size", value=model.hidden_size
            )
        ffn = mixers.ffn_dim
        if ffn is not None and (ffn < 1 or ffn % max(1, ranks)):
            yield ConfigIssue(f"model_parallel_size = {ranks} does not divide it", key="ffn_dim", value=ffn)
    if "mamba" in kinds and 2 * model.hidden_size % max(1, ranks):
        yield ConfigIssue(
            f"its blocks have {2 * model.hidden_size} channels, which model_parallel_size = {ranks} does not divide",
            key="hidden_size",
            value=model.hidden_size,
        )
    if {"gmlp", "amlp"} & set(kinds):
        yield from _gating(config)
    if GATED_DELTA_NET in kinds:
        yield from _delta_heads(config)


def _delta_heads(config: Config) -> Iterator[ConfigIssue]:
    """Key heads divide value heads, and ranks have whole key heads; what is made for attention has no place here."""
    mixers, ranks = config.mixers, max(1, config.parallelism.model_parallel_size)
    widths = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    small = [name for name in (*widths, "linear_conv_kernel_dim") if getattr(mixers, name) < 1]
    for name in small:
        yield ConfigIssue("it must be at least 1", key=name, value=getattr(mixers, name))
    keys, values = mixers.linear_num_key_heads, mixers.linear_num_value_heads
    if not small and values % keys:
        what = f"linear_num_key_heads = {keys} does not divide it"
        yield ConfigIssue(what, key="linear_num_value_heads", value=values)
    if not small and keys % ranks:
        yield ConfigIssue(
            f"model_parallel_size = {ranks} does not divide it, and ranks have whole key heads with their value heads",
            key="linear_num_key_heads",
            value=keys,
        )
    reasons = {
        "te_mha": (config.transformer_engine.te_mha, "Transformer Engine's attention has no such state"),
        "compile": (config.kernels.compile, "the chunks of its state are no part of a compiled graph"),
    }
    for key, (applies, why) in reasons.items():
        if applies:
            what = f"there are blocks of kind {GATED_DELTA_NET}: {why}"
            yield ConfigIssue(what, key=key, value=True, hint=f"leave {key} out")


def mamba2_sizes_fit(config: Config) -> Iterator[ConfigIssue]:
    """Heads make equal groups, and every tensor parallel rank has whole groups; steps have bounds in order."""
    mixers, hidden = config.mixers, config.model.hidden_size
    assert hidden
    sizes = ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups")
    given = [(name, getattr(mixers, name)) for name in sizes]
    small = [
        ConfigIssue("it must be at least 1", key=key, value=value)
        for key, value in given
        if value is not None and value < 1
    ]
    yield from small
    yield from _limits(mixers.mamba_dt_limit)
    if small or "mamba2" not in _kinds(config):
        return
    width, groups, ranks = mixers.mamba_head_dim, mixers.mamba_num_groups, config.parallelism.model_parallel_size
    heads = mixers.mamba_num_heads or 2 * hidden // width
    if mixers.mamba_num_heads is None and 2 * hidden % width:
        what = f"it does not divide 2 x hidden_size = {2 * hidden}"
        yield ConfigIssue(what, key="mamba_head_dim", value=width, hint="change it, or give mamba_num_heads")
    elif heads % groups:
        yield ConfigIssue(
            f"it does not divide the {heads} heads of a mamba2 block", key="mamba_num_groups", value=groups
        )
    elif ranks > 0 and groups % ranks:
        yield ConfigIssue(
            f"model_parallel_size = {ranks} does not divide it; the heads of a group share B, C and a norm, so a rank "
            "has whole groups",
            key="mamba_num_groups",
            value=groups,
            hint="use a number of ranks that divides the groups",
        )


def _limits(limits: tuple[object, ...] | None) -> Iterator[ConfigIssue]:
    """The bounds of a step: two numbers of which the first is not the larger one, or null."""
    numbers = [bound for bound in limits or () if bound is not None]
    fit = all(isinstance(bound, (int, float)) and not isinstance(bound, bool) and bound >= 0 for bound in numbers)
    if limits is not None and (len(limits) != 2 or not fit or numbers != sorted(numbers)):  # type: ignore[type-var]
        yield ConfigIssue(
            "these are not a smallest and a largest step",
            key="mamba_dt_limit",
            value=list(limits),
            hint="write two numbers of at least 0, such as [0.001, 0.1], with null for no bound",
        )


def _gating(config: Config) -> Iterator[ConfigIssue]:
    model = config.model
    if ACTIVATIONS.entry(model.activation).gated:
        yield ConfigIssue(
            "a gMLP gates by itself, and needs an activation that keeps the width",
            key="activation",
            value=model.activation,
            hint="use gelu or the like",
        )
    if config.mixers.gmlp_attn_dim < 1:
        yield ConfigIssue("it must be at least 1", key="gmlp_attn_dim", value=config.mixers.gmlp_attn_dim)
