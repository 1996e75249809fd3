"""Keys of models with retrieval, and what makes each of them matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATABASE, EMBEDDER = "not/built/yet", str(Path(__file__).parent)
RETRO: dict[str, Any] = {
    "retro_add_retriever": True,
    "retro_cross_attention_layers": [1],
    "retro_chunk_length": 8,
    "retro_project_dir": DATABASE,
    "pos_emb": "rotary",
    "pipe_parallel_size": 0,
}
BUILDS = {**RETRO, "user_script": "build_retro_database.py", "retro_embedder": EMBEDDER}
WHERE_RETRO_MATTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "retro_chunk_length": (16, RETRO),
    "retro_num_neighbors": (3, RETRO),
    "retro_num_retrieved_chunks": (3, RETRO),
    "retro_encoder_layers": (3, RETRO),
    "retro_encoder_hidden_dropout": (0.2, RETRO),
    "retro_encoder_attention_dropout": (0.2, RETRO),
    "retro_cross_attention_layers": ([0], RETRO),
    "retro_project_dir": (f"{DATABASE}/.", RETRO),
    "retro_embedder": (f"{EMBEDDER}/.", BUILDS),
    "retro_query_num_neighbors_save": (9, BUILDS),
}
