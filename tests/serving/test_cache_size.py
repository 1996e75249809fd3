"""The memory of keys and values that the service reserves, and the error where there is less."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.errors import ConfigError
from megatron.param_table import ModelDims
from megatron.serving.cache_size import CacheSize, check_cache
from tests.config.small import resolved

LLAMA: dict[str, Any] = {
    "num_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_kv_heads": 8,
    "seq_length": 131_072,
    "max_position_embeddings": 131_072,
}


def size(**more: Any) -> CacheSize:
    """The cache of a model of Llama 3.2 1B's sizes."""
    config = resolved(**LLAMA).config
    given = {"rows": 1, "length": 131_072, "width": 2, **more}
    return CacheSize(ModelDims.of(config.model, config.moe, config.mixers), **given)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 2 * 16 * 8 * 64 * 131_072 * 2),  # keys and values, blocks, heads, width, tokens, bytes
        ({"width": 4}, 2 * 16 * 8 * 64 * 131_072 * 4),
        ({"model_size": 2, "pipe_size": 2}, 2 * 8 * 4 * 64 * 131_072 * 2),
        ({"modules": 2}, 2 * 8 * 64 * (16 * 131_072 + 2 * 131_075) * 2),  # drafts reach three tokens further
    ],
)
def test_bytes_of_a_text(more: dict[str, Any], expected: int) -> None:
    assert size(**more).row_bytes == expected


def test_more_than_the_memory_is_refused_with_what_fits() -> None:
    check_cache(size(rows=8), 32 * 2**30)
    with pytest.raises(
        ConfigError, match=r"8 texts of 131,072 tokens take 32\.0 GiB, and a rank has 9\.0 GiB"
    ) as caught:
        check_cache(size(rows=8), 9 * 2**30)
    assert "less than 3 texts at a time fit, or a seq_length of 36,864" in str(caught.value)
    with pytest.raises(ConfigError, match="set a seq_length of 65,536 or less"):
        check_cache(size(), 2 * 2**30)
