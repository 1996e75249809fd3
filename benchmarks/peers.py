"""The other training steps of train_step.py: what a user would write or pick in place of this project.

transformers' GPT-NeoX with its plain and its sdpa attention, and a model written in plain torch in two shapes: that of
litgpt's Pythia (rotary over a quarter of each head, parallel residual, untied head) and that of nanoGPT (learned
positions, sequential blocks, tied head). Each as it is and through torch.compile; in bfloat16 with bfloat16 parameters
and fp32 master weights, or with fp32 parameters under autocast.

b micro batch, s sequence, h hidden, d head dim, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import Shape, Step, plain_loop
from megatron.distributed.process_group import device
from megatron.engine.builder import DTYPES


class PlainBlock(nn.Module):
    """Attention and a gelu MLP with layer norms and biases."""

    def __init__(self, shape: Shape, *, parallel: bool) -> None:
        super().__init__()
        width = shape.hidden
        self.heads, self.parallel = shape.heads, parallel
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """[b, s, h] -> [b, s, h]; angles: cosines and sines [s, r] of the rotated features."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        if angles is not None:
            q, k = rotated(q, *angles), rotated(k, *angles)
        mixed = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        if self.parallel:
            return x + mixed + self.down(F.gelu(self.up(self.mlp_norm(x))))
        x = x + mixed
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[b, n, s, d] with its first r features rotated by halves."""
    count = cosines.shape[-1]
    turned, rest = x[..., :count], x[..., count:]
    first, second = turned.chunk(2, -1)
    turned = turned * cosines + torch.cat((-second, first), -1) * sines
    return torch.cat((turned.to(x.dtype), rest), -1)


class PlainModel(nn.Module):
    """A decoder in plain torch: litgpt's shape of Pythia, or nanoGPT's where positions are learned."""

    def __init__(self, shape: Shape, *, learned: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, shape.hidden)
        self.positions = nn.Embedding(shape.sequence, shape.hidden) if learned else None
        self.blocks = nn.ModuleList(PlainBlock(shape, parallel=not learned) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if learned:
            self.head.weight = self.words.weight
        count = shape.hidden // shape.heads // 4
        rates = 10000.0 ** (-torch.arange(0, count, 2) / count)
        table = torch.outer(torch.arange(shape.sequence), rates).repeat(1, 2)
        self.register_buffer("cosines", table.cos(), persistent=False)
        self.register_buffer("sines", table.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [b, s] -> logits [b, s, v]."""
        x = self.words(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        angles = None if self.positions is not None else (self.cosines, self.sines)
        for block in self.blocks:
            x = block(x, angles)
        logits: Tensor = self.head(self.norm(x))
        return logits


def transformers_model(shape: Shape, attention: str) -> nn.Module:
    """GPTNeoXForCausalLM with its own plain attention ("eager") or torch's ("sdpa")."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    architecture = GPTNeoXConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        max_position_embeddings=shape.sequence,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_cache=False,
        attn_implementation=attention,
    )
    return GPTNeoXForCausalLM(architecture)


MODELS: dict[str, Callable[[Shape], nn.Module]] = {
    "transformers eager": lambda shape: transformers_model(shape, "eager"),
    "transformers sdpa": lambda shape: transformers_model(shape, "sdpa"),
    "litgpt's shape": lambda shape: PlainModel(shape, learned=False),
    "nanoGPT's shape": lambda shape: PlainModel(shape, learned=True),
}


def peer(name: str, shape: Shape, precision: str, *, compiled: bool, autocast: bool = False) -> Step:
    """A step of a peer.

    Args:
        name: Of MODELS.
        shape: Sizes.
        precision: "fp32" or "bfloat16".
        compiled: Through torch.compile.
        autocast: In bfloat16: fp32 parameters, whose products are in bfloat16.
    """
    dtype = torch.float32 if autocast else DTYPES[precision]
    model = MODELS[name](shape).to(device(), dtype).train()
    forward: Any = torch.compile(model) if compiled else model

    def logits(tokens: Tensor) -> Tensor:
        context: AbstractContextManager[object] = nullcontext()
        if autocast:
            context = torch.autocast(tokens.device.type, torch.bfloat16)
        with context:
            found = forward(tokens)
        result: Tensor = getattr(found, "logits", found)
        return result

    return plain_loop(model, logits, shape)


def product_floor(shape: Shape, precision: str, repeats: int = 5) -> float:
    """Seconds of a step's matrix products of linear layers alone, forward and backward, each at its best of some.

    Each weight [out, in] has three products with the tokens of a micro batch: the output, and the gradients of the
    input and of the weight.
    """
    from time import perf_counter

    width, dtype = shape.hidden, DTYPES[precision]
    sizes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * shape.layers
    counts = {size: sizes.count(size) for size in sizes}
    counts[(shape.vocabulary, width)] = counts.get((shape.vocabulary, width), 0) + 1
    total = 0.0
    for (rows, columns), count in counts.items():
        x, weight, grad = (
            torch.randn(size, dtype=dtype) for size in ((shape.tokens, columns), (rows, columns), (shape.tokens, rows))
        )
        for product in (lambda: x @ weight.T, lambda: grad @ weight, lambda: grad.T @ x):  # noqa: B023
            best = float("inf")
            for _ in range(repeats):
                started = perf_counter()
                product()
                best = min(best, perf_counter() - started)
            total += count * best
    return total
