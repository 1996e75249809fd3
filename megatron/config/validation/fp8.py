"""Rules for products in FP8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.config.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import MIXER_BLOCKS
from megatron.registry.fp8 import FP8_RECIPES

KEY = "fp8"


def fp8_recipe_is_usable(config: Config) -> Iterator[ConfigIssue]:
    """The recipe is known, the model is in bfloat16, and the sizes of its products divide by the recipe's blocks."""
    block = config.precision.fp8
    if block is None:
        return
    known = ", ".join(FP8_RECIPES)
    recipe = FP8_RECIPES.get(str(block.get("recipe")))
    if recipe is None or set(block) != {"recipe"}:
        yield ConfigIssue(f"it has one field, recipe, which is one of {known}", key=KEY, value=block)
        return
    if config.precision.precision != "bfloat16":
        what = f"products in FP8 are for models in bfloat16, and precision is {config.precision.precision}"
        yield ConfigIssue(what, key=KEY, value=block, hint="write precision: bfloat16")
    if config.transformer_engine.layers:
        what = f"{config.transformer_engine.layers[0]} gives the products to Transformer Engine"
        yield ConfigIssue(what, key=KEY, value=block, hint="leave one of them out")
    kinds = frozenset(config.model.attention_config or ())
    if kinds and kinds <= MIXER_BLOCKS:
        yield ConfigIssue(f"blocks of {', '.join(sorted(kinds))} have no such products", key=KEY, value=block)
    yield from product_sizes(config, KEY, block, widths=recipe.multiple, tokens=recipe.multiple)


def product_sizes(config: Config, key: str, value: Any, *, widths: int, tokens: int) -> Iterator[ConfigIssue]:
    """Yields the sizes of products that do not divide.

    Args:
        config: Full configuration.
        key: The key that asks for FP8.
        value: Its value.
        widths: Divisor of widths.
        tokens: Divisor of the number of tokens of a micro batch.
    """
    for name, width in divided_widths(config).items():
        if width % widths:
            what = f"FP8 needs widths that divide by {widths}, and {name} is {width}"
            yield ConfigIssue(what, key=key, value=value, hint=f"change it, or leave {key} out")
    micro_batch = config.training.train_micro_batch_size_per_gpu
    assert config.model.seq_length
    count = config.model.seq_length * (micro_batch or 1) // max(1, config.parallelism.context_parallel_size)
    if micro_batch and count % tokens:
        what = f"FP8 needs numbers of tokens that divide by {tokens}, and a micro batch of a rank has {count}"
        yield ConfigIssue(what, key=key, value=value, hint=f"change seq_length, or leave {key} out")


def divided_widths(config: Config) -> dict[str, int]:
    """Returns the widths of what the matrices of attention and MLP read on a rank, by their names in messages."""
    model, ranks = config.model, max(1, config.parallelism.model_parallel_size)
    assert model.hidden_size
    assert model.num_attention_heads
    assert model.kv_channels
    return {
        "hidden_size": model.hidden_size,
        "the width of the heads of a rank": model.num_attention_heads * model.kv_channels // ranks,
        "the inner width of the MLP on a rank": model.mlp_width // ranks,
    }
