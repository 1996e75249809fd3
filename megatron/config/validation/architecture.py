"""Rules for the shape of a block and its positions."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import NORMS, POSITIONS


def heads_divide_hidden(config: Config) -> Iterator[ConfigIssue]:
    """Without kv_channels, every head has hidden_size / num_attention_heads features."""
    model = config.model
    assert model.hidden_size and model.num_attention_heads
    if model.multi_latent_attention:
        return  # another rule
    if model.kv_channels is not None and model.kv_channels < 1:
        yield ConfigIssue("a head needs at least one feature", key="kv_channels", value=model.kv_channels)
    elif (
        model.kv_channels == model.hidden_size // model.num_attention_heads
        and model.hidden_size % model.num_attention_heads
        and not {"mamba", "mamba2"} & set(model.attention_config or ())
    ):
        yield ConfigIssue(
            f"num_attention_heads = {model.num_attention_heads} does not divide it",
            key="hidden_size",
            value=model.hidden_size,
            hint="change one of the two, or give kv_channels, the width of a head",
        )


def positions_cover_sequence(config: Config) -> Iterator[ConfigIssue]:
    """Every token of a sequence needs a position."""
    model = config.model
    assert model.max_position_embeddings is not None
    assert model.seq_length is not None
    longest = model.longest_stack or model.seq_length
    if model.max_position_embeddings < longest:
        yield ConfigIssue(
            f"it is less than {'seq_length' if longest == model.seq_length else 'a sequence'} = {longest}",
            key="max_position_embeddings",
            value=model.max_position_embeddings,
            hint="raise it, or shorten seq_length",
        )


def skipped_positions_are_learned(config: Config) -> Iterator[ConfigIssue]:
    """Only a table of learned positions has rows to skip."""
    model = config.model
    if model.opt_pos_emb_offset < 0:
        yield ConfigIssue("it cannot be negative", key="opt_pos_emb_offset", value=model.opt_pos_emb_offset)
    elif model.opt_pos_emb_offset and "opt_pos_emb_offset" not in POSITIONS.entry(model.pos_emb).settings:
        yield ConfigIssue(
            f"pos_emb {model.pos_emb} has no rows to skip",
            key="opt_pos_emb_offset",
            value=model.opt_pos_emb_offset,
            hint="set pos_emb: learned, or leave it out",
        )


def norms_have_their_bias(config: Config) -> Iterator[ConfigIssue]:
    """Some norms, such as Transformer Engine's layernorm, always have a bias."""
    norm = NORMS.entry(config.model.norm)
    if "bias" in set(norm.tensors) - set(norm.optional) and not config.model.use_bias_in_norms:
        what = f"norm = {norm.name} always has a bias"
        yield ConfigIssue(what, key="use_bias_in_norms", value=False, hint="leave it out, or use norm: layernorm")


def rotary_turns_pairs(config: Config) -> Iterator[ConfigIssue]:
    """Rotary positions rotate pairs of features, on the first rotary_pct of each head."""
    model = config.model
    if model.pos_emb != "rotary" or model.kv_channels is None or model.multi_latent_attention:
        return
    turned = int(model.kv_channels * model.rotary_pct)
    if not 0 < model.rotary_pct <= 1:
        yield ConfigIssue("it must be above 0 and at most 1", key="rotary_pct", value=model.rotary_pct)
    elif turned % 2 or turned == 0:
        yield ConfigIssue(
            f"it turns {turned} of the {model.kv_channels} features of a head, which is not a number of pairs",
            key="rotary_pct",
            value=model.rotary_pct,
        )
