"""Model FLOPs: the arithmetic that training needs, however it is carried out.

Per token, forward: 2 FLOPs for each weight of a matrix product, and 4 s (n d) a layer for the two attention products
(scores, and their product with the values) over the full s x s matrix. Backward costs twice the forward. Source:
Narayanan et al. 2021, arXiv:2104.04473, appendix, without its recomputation term; for n d = h, an MLP of width 4 h and
multi-head attention that is 72 b s l h^2 (1 + s/(6 h) + v/(12 l h)) a step. The PaLM paper's 6 N + 12 l s h a token
(arXiv:2204.02311, appendix B) is the same count. Causal attention needs only half of its two products; the convention
counts them whole, and published figures follow it. Recomputed activations, embedding lookups, norms and softmax do not
count.

s sequence, h hidden, n heads, d head dim, v vocabulary, l layers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FlopsShape:
    """The plain numbers that the count needs.

    mlp_width: the width between the MLP's two products. gated: the first one makes two of that width. vocab_size: the
    padded one.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    kv_channels: int
    mlp_width: int
    gated: bool
    vocab_size: int
    seq_length: int


def forward_flops_per_token(shape: FlopsShape) -> int:
    """FLOPs of a forward pass over a sequence of `seq_length`, divided by its tokens [FLOP/token]."""
    query_width = shape.num_attention_heads * shape.kv_channels
    kv_width = shape.num_kv_heads * shape.kv_channels
    attention_weights = shape.hidden_size * (query_width + 2 * kv_width) + query_width * shape.hidden_size
    mlp_weights = shape.hidden_size * shape.mlp_width * (3 if shape.gated else 2)
    products = 2 * (attention_weights + mlp_weights) + 4 * shape.seq_length * query_width
    return shape.num_layers * products + 2 * shape.hidden_size * shape.vocab_size


def training_flops_per_token(shape: FlopsShape) -> int:
    """Forward and backward, without recomputation [FLOP/token]."""
    return 3 * forward_flops_per_token(shape)
