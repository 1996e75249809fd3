"""What a model with retrieval cannot have or be run by, each refused with its key and a reason."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.retro import BUILDS, EMBEDDER, RETRO
from tests.config.small import errors, resolved

SETS = {f"{split}_data_paths": ["a", "b"] for split in ("train", "valid", "test")}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"retro_chunk_length": 12}, "a sequence of 32 tokens does not divide into chunks"),
    ({"retro_chunk_length": 0}, "it must be at least 1"),
    ({"retro_encoder_layers": 0}, "it must be at least 1"),
    ({"retro_encoder_hidden_dropout": 1.0}, "it must be from 0 to below 1"),
    ({"retro_cross_attention_layers": None}, "none of the 2 blocks attends to neighbours"),
    ({"retro_cross_attention_layers": [2]}, "these are no blocks of the model"),
    ({"retro_cross_attention_layers": [1, 0]}, "these are no blocks of the model"),
    ({"attention_config": ["global", "mamba"]}, "one of kind mamba has no attention"),
    ({"retro_project_dir": None}, "needs the folder of neighbours"),
    ({"pos_emb": "alibi"}, "biases are those of earlier tokens"),
    ({"gpt_j_residual": True}, "cross attention follows attention"),
    ({"norm_placement": "sandwich"}, "its three norms"),
    ({"softmax_type": "off-by-one"}, "sums the keys alone"),
    ({"use_qk_layernorm": True}, "keys and values of plain heads"),
    ({"lora": {"rank": 2}, "load": "x"}, "the encoder of neighbours has no such option"),
    ({"pipe_parallel_size": 1}, "its encoder is inside a block"),
    ({"reset_attention_mask": True}, "a chunk may hold the end of one document"),
    ({"pack_impl": "unpacked"}, "neighbours are those of joined documents"),
    ({"checkpoint_activations": True, "checkpoint_num_layers": 2}, "inputs of two kinds"),
    ({"valid_loss_per_set": True, "data_path": None, **SETS}, "samples of one validation set"),
    ({"pos_emb": "learned", "retro_chunk_length": 32}, "a neighbour has 64 tokens, and there are 32 positions"),
    ({"mtp_num_layers": 1}, "its modules would have no neighbours"),
    ({"user_script": "evaluate.py"}, "evaluate.py reads texts that have no neighbours"),
    ({"user_script": "generate.py", "retro_embedder": EMBEDDER}, "stores nothing of earlier tokens"),
    ({"user_script": "generate.py", "recompute": True}, "generate.py needs an encoder"),
    ({"retro_add_retriever": False, "user_script": "build_retro_database.py"}, "of a model that retrieves"),
    ({**BUILDS, "retro_embedder": None}, "needs an encoder"),
    ({**BUILDS, "retro_query_num_neighbors_save": 1}, "the model attends to 2"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert any(reason in line for line in errors(**{**RETRO, **changes})), errors(**{**RETRO, **changes})


def test_two_ranks_share_no_key_head_and_no_sequence() -> None:
    two = {**RETRO, "model_parallel_size": 2}
    assert any("a shard of a sequence has no whole chunks" in line for line in errors(2, **two, sequence_parallel=True))
    assert any("shares no key head" in line for line in errors(2, **two, num_kv_heads=1))
    sizes = {"context_parallel_size": 2}
    assert any("a chunk and its neighbours are not shared out" in line for line in errors(2, **RETRO, **sizes))


def test_blocks_are_those_of_megatron_where_none_are_named() -> None:
    from megatron.param_table import RetroDims

    for layers, blocks in ((12, (5, 8, 11)), (15, (5, 8, 11, 14)), (24, (8, 11, 14, 17, 20, 23))):
        config = resolved(**{**RETRO, "num_layers": layers, "retro_cross_attention_layers": None}).config
        sizes = RetroDims.of(config.model)
        assert sizes is not None and sizes.blocks == blocks
    assert resolved(**BUILDS).config.retrieval.retro_embedder == EMBEDDER
