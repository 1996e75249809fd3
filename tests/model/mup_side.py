"""A small GPT written with the authors' package `mup` (arXiv:2203.03466), as an independent reference.

Its parameters have the names of ours, `<layer>.<name>`, with dots as slashes. Queries, keys and values are in the
rows of one matrix head by head, as ours do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mup
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """One model. base_head: head dimension of the base model."""

    hidden: int
    heads: int
    layers: int
    vocabulary: int
    positions: int
    tied: bool
    base_head: int


class Theirs(nn.Module):
    """Learned positions, layer norms, gelu; attention scaled by sqrt(d0) / d; MuReadout or MuSharedReadout."""

    def __init__(self, size: Size, factors: Mapping[str, float]) -> None:
        super().__init__()
        self.size, self.factors = size, factors
        width, last = size.hidden, size.layers + 4
        self.parts = nn.ModuleDict()
        self._add("0.word_embeddings", nn.Embedding(size.vocabulary, width))
        self._add("0.position_embeddings", nn.Embedding(size.positions, width))
        for layer in range(2, size.layers + 2):
            self._add(f"{layer}.input_layernorm", nn.LayerNorm(width))
            self._add(f"{layer}.attention.query_key_value", nn.Linear(width, 3 * width))
            self._add(f"{layer}.attention.dense", nn.Linear(width, width))
            self._add(f"{layer}.post_attention_layernorm", nn.LayerNorm(width))
            self._add(f"{layer}.mlp.linear1", nn.Linear(width, 4 * width))
            self._add(f"{layer}.mlp.linear2", nn.Linear(4 * width, width))
        self._add(f"{last - 1}.norm", nn.LayerNorm(width))
        temper = {"bias": False, "output_mult": 1 / factors["mup_output_temp"]}
        if size.tied:
            self.readout = mup.MuSharedReadout(self.part("0.word_embeddings").weight, **temper)
        else:
            self._add(f"{last}.final_linear", mup.MuReadout(width, size.vocabulary, **temper))

    def _add(self, name: str, module: nn.Module) -> None:
        self.parts[name.replace(".", "/")] = module

    def part(self, name: str) -> nn.Module:
        """The module of that name."""
        return self.parts[name.replace(".", "/")]

    def keyed(self) -> dict[str, nn.Parameter]:
        """Our key -> parameter."""
        found = dict(self.parts.named_parameters())
        return {name.replace("/", "."): parameter for name, parameter in found.items()}

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] -> logits [b, s, v]."""
        length, layers = tokens.shape[1], self.size.layers
        x = self.part("0.word_embeddings")(tokens) + self.part("0.position_embeddings")(torch.arange(length))
        x = x * self.factors["mup_embedding_mult"]
        for layer in range(2, layers + 2):
            x = x + self._attention(layer, self.part(f"{layer}.input_layernorm")(x))
            y = self.part(f"{layer}.mlp.linear1")(self.part(f"{layer}.post_attention_layernorm")(x))
            x = x + self.part(f"{layer}.mlp.linear2")(F.gelu(y))
        x = self.part(f"{layers + 3}.norm")(x)
        return self.readout(x) if self.size.tied else self.part(f"{layers + 4}.final_linear")(x)

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads, dim = self.size.heads, width // self.size.heads
        rows = self.part(f"{layer}.attention.query_key_value")(x).view(batch, length, heads, 3, dim)
        q, k, v = rows.permute(3, 0, 2, 1, 4)  # [b, n, s, d] each
        scores = q @ k.transpose(-1, -2) * (math.sqrt(self.size.base_head) / dim / self.factors["mup_attn_temp"])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.part(f"{layer}.attention.dense")((weights @ v).transpose(1, 2).reshape(batch, length, width))


def build_theirs(size: Size, base: Size, factors: Mapping[str, float]) -> Theirs:
    """The model with its base shapes set, by a base and a delta model as the package wants them."""
    delta = Size(2 * base.hidden, base.heads, base.layers, base.vocabulary, base.positions, base.tied, base.base_head)
    model = Theirs(size, factors)
    mup.set_base_shapes(model, Theirs(base, factors), delta=Theirs(delta, factors), rescale_params=False)
    return model
