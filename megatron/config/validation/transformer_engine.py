"""Rules for layers of Transformer Engine."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.adapter_config import low_rank
from megatron.config.config import Config
from megatron.config.validation.fp8 import product_sizes
from megatron.errors import ConfigIssue
from megatron.registry import ACTIVATIONS, NORMS, TE_LAYERS

ROWS, COLUMNS = 8, 16
"""Divisors of the sizes of FP8 products: tokens, and widths."""


def norm_and_mlp_are_one_layer(config: Config) -> Iterator[ConfigIssue]:
    """The fused layer of norm and MLP supports its own norms and activations, and a norm that only the MLP reads."""
    model, key = config.model, "te_layernorm_mlp"
    updates = low_rank(model.lora)
    if updates is not None and updates.magnitudes and config.transformer_engine.layers:
        what = "dora scales the product of a frozen matrix without its bias, which layers of Transformer Engine add"
        yield ConfigIssue(what, key="lora", value=model.lora, hint="leave dora or the te_ keys out")
    if not config.transformer_engine.te_layernorm_mlp:
        return
    if ACTIVATIONS.entry(model.activation).in_transformer_engine is None:
        built = [entry.name for entry in ACTIVATIONS if entry.in_transformer_engine is not None]
        what = f"it has no {model.activation} as this model's weights have it (a gated one takes its halves in turn)"
        yield ConfigIssue(what, key=key, value=True, hint=f"leave it out, or use one of {', '.join(built)}")
    norm = NORMS.entry(model.norm)
    if not norm.in_transformer_engine or (norm.optional and not model.use_bias_in_norms):
        what = "it computes layernorm with a bias, and rmsnorm"
        yield ConfigIssue(what, key=key, value=True, hint="leave it out")
    if model.gpt_j_residual and model.gpt_j_tied:
        yield ConfigIssue("with gpt_j_tied attention reads the same norm", key=key, value=True, hint="leave it out")
    if config.moe.moe_num_experts > 1:
        yield ConfigIssue("blocks with experts have no MLP", key=key, value=True, hint="leave it out")
    if updates is not None and any(name.startswith("mlp.") for name in updates.modules()):
        hint = "leave it out, or write targets: [query_key_value, dense]"
        yield ConfigIssue("low-rank updates cannot be added within it", key=key, value=True, hint=hint)


def fp8_has_layers(config: Config) -> Iterator[ConfigIssue]:
    """FP8 needs layers of Transformer Engine, scales of earlier steps, and sizes that divide by its blocks."""
    section = config.transformer_engine
    if section.te_fp8_amax_history_len < 1:
        value = section.te_fp8_amax_history_len
        yield ConfigIssue("at least one step is looked at", key="te_fp8_amax_history_len", value=value)
    if not section.te_fp8_mha:
        return
    if not section.layers:
        hint = f"switch on one of {', '.join(TE_LAYERS.names)}"
        yield ConfigIssue("no layer is Transformer Engine's", key="te_fp8_mha", value=True, hint=hint)
    if not section.te_fp8_wgrad:
        what = (
            "since its version 2 Transformer Engine computes weight gradients in FP8 where it computes products in it"
        )
        yield ConfigIssue(what, key="te_fp8_wgrad", value=False, hint="leave it out, or te_fp8_mha")
    if config.recompute.checkpoint_activations:
        what = "recomputed blocks would count twice in the scales of FP8"
        yield ConfigIssue(what, key="checkpoint_activations", value=True, hint="leave it out, or te_fp8_mha")
    yield from product_sizes(config, "te_fp8_mha", True, widths=COLUMNS, tokens=ROWS)
