"""What encoders of queries and passages cannot have, and what follows from their objectives."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.plan.report import make_plan
from tests.config.small import errors, resolved

ICT: dict[str, Any] = {"train_impl": "ict", "data_path": "d"}
DPR: dict[str, Any] = {"train_impl": "dpr", "task_train_data": ["a.json"]}
CASES: list[tuple[dict[str, Any], str]] = [
    ({**ICT, "pipe_parallel_size": 1}, "do not follow each other, as stages of a pipeline do"),
    ({**ICT, "query_in_block_prob": 1.5}, "it must be from 0 to 1"),
    ({**ICT, "retrieval_projection_size": -1}, "0 is no projection"),
    ({**ICT, "retrieval_report_topk_accuracies": [0]}, "these are no first passages"),
    ({**ICT, "data_path": None, "train_data_paths": ["a"], "titles_data_path": "t"}, "titles are those of data_path's"),
    ({**ICT, "data_path": None, "train_data_paths": ["a"], "train_label_data_paths": ["b"]}, "belongs to its block"),
    ({**ICT, "seq_length": 6, "max_position_embeddings": 6}, "a sample has at least 8 tokens"),
    ({**ICT, "lm_head": "masked"}, "train_impl: ict has the head retrieval"),
    ({**ICT, "attention_mask": "causal"}, "train_impl: ict asks for tokens from both sides"),
    ({**ICT, "compile": True}, "it compiles the blocks of one stack"),
    ({**ICT, "char_level_ppl": True}, "its loss is of no characters"),
    ({**ICT, "bert_binary_head": True}, "the order of segments is learned with train_impl: bert"),
    ({**DPR, "task_train_data": None}, "train_impl: dpr trains on a task"),
    ({**DPR, "task_format": "tsv"}, "train_impl: dpr reads questions with their passages"),
    ({**DPR, "retrieval_hard_negatives": -1}, "it cannot be negative"),
    ({**DPR, "data_path": "d"}, "a task is not read from token files"),
    ({**DPR, "rampup_batch_size": [1, 1, 8]}, "epochs of a task are counted in steps of one size"),
    ({**DPR, "user_script": "tools/embed_passages.py"}, "embed_passages.py needs it"),
    ({**DPR, "user_script": "search_passages.py", "embedding_path": "e"}, "search_passages.py needs it"),
    ({**DPR, "user_script": "embed_passages.py", "evidence_data_path": "none.tsv"}, "there is no such file"),
    ({**DPR, "user_script": "search_passages.py", "retrieval_ivf_probes": 0}, "it must be 1 or more"),
    ({"user_script": "search_passages.py"}, "it has no encoders of queries and passages"),
    ({**DPR, "context_parallel_size": 2}, "a ring skips later tokens"),
]


@pytest.mark.parametrize(("changes", "reported"), CASES, ids=[case[1][:50] for case in CASES])
def test_rule(changes: dict[str, Any], reported: str) -> None:
    lines = errors(2 if "context_parallel_size" in changes else 1, **changes)
    assert any(reported in line for line in lines), "\n".join(lines)


def test_objectives_decide_head_samples_and_figures() -> None:
    """Two encoders have twice the parameters; each sequence passes one of them."""
    found = resolved(**ICT, no_weight_tying=False)
    model = found.config.model
    assert (model.lm_head, model.attention_mask, model.num_token_types) == ("retrieval", "bidirectional", 2)
    assert found.config.data.pack_impl == "unpacked" and not found.not_supported_yet and not found.warnings
    assert resolved(**DPR).config.task.task_format == "dpr"
    two = make_plan(found)
    one = make_plan(resolved(**ICT, retrieval_shared_encoder=True))
    wide = make_plan(resolved(**DPR, retrieval_hard_negatives=2, retrieval_projection_size=16))
    assert two.parameters is not None and one.parameters is not None and wide.parameters is not None
    hidden, length, layers, width, words = 64, 32, 2, 256, 512
    block = 4 * hidden * hidden + 2 * hidden * width + 4 * hidden + width + hidden + 4 * hidden
    assert one.parameters == (words + length + 2) * hidden + layers * block + 2 * hidden
    assert two.parameters == 2 * one.parameters
    assert wide.parameters == 2 * (one.parameters + hidden * 16 + 16)
    matrices, samples, passed = layers * (4 * hidden * hidden + 2 * hidden * width), 2, 3 * 2
    row = length * passed * (matrices + layers * 2 * length * hidden)
    assert two.flops_per_iteration == one.flops_per_iteration == 2 * samples * row
    projections = length * passed * (hidden * 16 // length)
    assert wide.flops_per_iteration == 4 * samples * (row + projections)
    assert "2 encoders of 2 blocks" in two.text() and "2 encoders" not in one.text()
