"""Keys of encoders of queries and passages, and what makes each of them matter."""

from __future__ import annotations

from typing import Any

ICT: dict[str, Any] = {"train_impl": "ict", "data_path": "d", "no_weight_tying": False, "pos_emb": "learned"}
DPR: dict[str, Any] = {
    "train_impl": "dpr",
    "task_train_data": ["x.json"],
    "no_weight_tying": False,
    "pos_emb": "learned",
}
FILES: dict[str, Any] = {"evidence_data_path": __file__, "embedding_path": "x", "qa_data": [__file__]}
SEARCHES: dict[str, Any] = {**DPR, **FILES, "user_script": "search_passages.py"}

WHERE_RETRIEVAL_MATTERS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "retrieval_score_scaling": (True, ICT),
    "retrieval_report_topk_accuracies": ([2], ICT),
    "retrieval_shared_encoder": (True, ICT),
    "retrieval_projection_size": (8, ICT),
    "titles_data_path": ("t", ICT),
    "query_in_block_prob": (0.2, ICT),
    "use_one_sent_docs": (True, ICT),
    **{key: (value, None) for key, value in (("evidence_data_path", "x.tsv"), ("qa_data", ["x.tsv"]))},
    "embedding_path": ("y", SEARCHES),
    "retrieval_match": ("regex", SEARCHES),
    "retrieval_index": ("flat", SEARCHES),
    "retrieval_ivf_probes": (3, {**SEARCHES, "retrieval_index": "ivf"}),
    **{f"retrieval_{name}_negatives": (2, DPR) for name in ("hard", "other", "valid_hard", "valid_other")},
}
