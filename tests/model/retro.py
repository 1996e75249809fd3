"""A language model with neighbours as a loop over chunks in float64: the formulas of arXiv:2112.04426, one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK, NEIGHBORS, RETRIEVED, CHUNKS, BATCH = 8, 2, 2, 3, 2
LENGTH, NEIGHBOR = CHUNK * CHUNKS, CHUNK * RETRIEVED
HEADS = 4
KEYS = {
    "num_layers": 3,
    "retro_add_retriever": True,
    "retro_chunk_length": CHUNK,
    "retro_num_neighbors": NEIGHBORS,
    "retro_num_retrieved_chunks": RETRIEVED,
    "retro_encoder_layers": 2,
    "retro_cross_attention_layers": (1, 2),
    "retro_encoder_hidden_dropout": 0.0,
    "retro_encoder_attention_dropout": 0.0,
    "pos_emb": "learned",
}
"""Three blocks of 64 features; chunks of 8 tokens, each with two neighbours of 16."""


class Loop:
    """The model with the given weights, by our names. Each text is [s], its neighbours [l, k, r]."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def logits(self, text: Tensor, neighbors: Tensor) -> Tensor:
        """Logits [s, v] of one text."""
        hidden = self._embed(text)
        encoded: list[list[Tensor]] = []
        for block in range(3):
            name = f"{block + 2}"
            hidden = hidden + self._attention(self._norm(hidden, f"{name}.input_layernorm"), name, causal=True)
            if block in KEYS["retro_cross_attention_layers"]:  # type: ignore[operator]
                normed = self._norm(hidden, f"{name}.cross_attention_layernorm")
                if not encoded:
                    encoded = [
                        [
                            self._encode(each, normed[u * CHUNK : (u + 1) * CHUNK], f"{name}.retro_encoder")
                            for each in of
                        ]
                        for u, of in enumerate(neighbors)
                    ]
                hidden = hidden + self._cross_chunks(normed, encoded, f"{name}.cross_attention")
            hidden = hidden + self._mlp(self._norm(hidden, f"{name}.post_attention_layernorm"), name)
        return self._norm(hidden, "6.norm") @ self._weights["7.final_linear.weight"].t()

    def _cross_chunks(self, normed: Tensor, encoded: list[list[Tensor]], name: str) -> Tensor:
        """Token i attends to the neighbours of the last chunk that ends at i or before."""
        rows = []
        for i, query in enumerate(normed):
            u = (i + 1) // CHUNK - 1
            attended = torch.zeros_like(query) if u < 0 else self._cross(query[None], torch.cat(encoded[u]), name)[0]
            rows.append(attended)
        return torch.stack(rows)

    def _encode(self, tokens: Tensor, chunk: Tensor, name: str) -> Tensor:
        hidden = self._embed(tokens)
        for layer in range(2):
            own = f"{name}.{layer}"
            hidden = hidden + self._attention(self._norm(hidden, f"{own}.input_layernorm"), own, causal=False)
            if layer == 0:
                normed = self._norm(hidden, f"{own}.cross_attention_layernorm")
                hidden = hidden + self._cross(normed, chunk, f"{own}.cross_attention")
            hidden = hidden + self._mlp(self._norm(hidden, f"{own}.post_attention_layernorm"), own)
        return hidden

    def _embed(self, tokens: Tensor) -> Tensor:
        words, positions = (self._weights[f"0.{kind}_embeddings.weight"] for kind in ("word", "position"))
        return words[tokens] + positions[: len(tokens)]

    def _attention(self, x: Tensor, name: str, *, causal: bool) -> Tensor:
        q, k, v = self._linear(x, f"{name}.attention.query_key_value").view(len(x), HEADS, 3, -1).unbind(2)
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril() if causal else None
        return self._linear(_heads(q, k, v, mask), f"{name}.attention.dense")

    def _cross(self, x: Tensor, read: Tensor, name: str) -> Tensor:
        q = self._linear(x, f"{name}.query").view(len(x), HEADS, -1)
        k, v = self._linear(read, f"{name}.key_value").view(len(read), HEADS, 2, -1).unbind(2)
        return self._linear(_heads(q, k, v, None), f"{name}.dense")

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        return self._linear(F.gelu(self._linear(x, f"{name}.mlp.linear1")), f"{name}.mlp.linear2")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self._weights[f"{name}.weight"].t() + self._weights[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], 1e-5)


def _heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("qnd,knd->nqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v).flatten(1)
