"""Rules for blocks that share the values of the first one."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import ATTENTION_ALONE, BIDIRECTIONAL, WITHOUT_ATTENTION

KEY = "value_residual"


def values_pass_from_block_to_block(config: Config) -> Iterator[ConfigIssue]:
    """Every block has attention over values of the same heads, and passes those of the first block on."""
    model = config.model
    if not model.value_residual:
        return
    reasons: dict[str, tuple[bool, str]] = {
        "num_layers": (model.num_layers == 1, "there is no block after the first"),
        "attention_config": (bool(_other_kinds(config)), f"{_other_kinds(config)} has no values to mix or pass on"),
        "multi_latent_attention": (model.multi_latent_attention, "its values are projections of latents"),
        "attention_mask": (model.attention_mask == BIDIRECTIONAL, "it is built for causal models"),
        "encoder_num_layers": (bool(model.encoder_num_layers), "its two stacks have values of different tokens"),
        "retro_add_retriever": (model.retro_add_retriever, "blocks that attend to neighbours do not pass values on"),
        "mtp_num_layers": (bool(model.mtp_num_layers), "its modules would have no values of the first block"),
        "te_mha": (config.transformer_engine.te_mha, "Transformer Engine's attention mixes no values"),
    }
    for key, (applies, why) in reasons.items():
        if applies:
            hint = f"change it, or leave {KEY} out"
            yield ConfigIssue(f"{KEY} is on: {why}", key=key, value=config.flat()[key], hint=hint)


def _other_kinds(config: Config) -> str:
    """Returns the kinds of blocks that are no block of attention and MLP, or ""."""
    found = {str(kind) for kind in config.model.attention_config or ()} & (WITHOUT_ATTENTION | {ATTENTION_ALONE})
    return " and ".join(sorted(found))
