"""What the public layout's model file says beside the weights, and what public tools check in it."""

from __future__ import annotations

from typing import Any

from megatron.config.schema.model import ModelSection


def public_facts(
    model: ModelSection,
    *,
    iteration: int,
    consumed_samples: int,
    skipped: int,
    data_size: int,
    model_size: int,
    tokenizer_type: str,
    divisible_by: int,
    padded_vocab_size: int,
) -> dict[str, Any]:
    """Counters, parallel sizes and the numbers of the model, as the public layout stores them.

    Args:
        model: Section with the shape of the model.
        iteration: Steps done.
        consumed_samples: Samples used so far.
        skipped: Steps whose update was skipped.
        data_size: Data-parallel degree.
        model_size: Tensor-parallel degree.
        tokenizer_type: Kind of tokenizer.
        divisible_by: The vocabulary is padded to a multiple of this.
        padded_vocab_size: Rows of the embedding.
    """
    return {
        "iteration": iteration,
        "global_steps": iteration,
        "global_samples": consumed_samples,
        "skipped_steps": skipped,
        "dp_world_size": data_size,
        "mp_world_size": model_size,
        "args": {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "max_position_embeddings": model.max_position_embeddings,
            "make_vocab_size_divisible_by": divisible_by,
            "padded_vocab_size": padded_vocab_size,
            "tokenizer_type": tokenizer_type,
            "model_parallel_size": model_size,
        },
    }
