"""The training steps that the benchmarks compare: ours, and a plain loop over any other model.

All have the same shapes (parallel residual, rotary over a quarter of each head, gelu, biases, untied head), the same
optimizer (AdamW, fused) and the same precision, and clip at 1.0. In bfloat16 every side keeps fp32 master weights and
accumulates gradients in fp32. b micro batch, s sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch, make_batch
from megatron.distributed.init import init_distributed
from megatron.distributed.process_group import device
from megatron.engine.builder import build_training_engine

RATE = 1e-4
Step = Callable[[], float]
"""One optimizer step; returns its loss, and so waits for the device."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of its micro batch."""

    layers: int
    """Number of blocks."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Attention heads of a block."""
    sequence: int
    """Length of a sample [tokens]."""
    micro_batch: int
    """Samples of a forward pass."""
    vocabulary: int
    """Number of ids."""

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.sequence * self.micro_batch


def batches(shape: Shape) -> Iterator[MicroBatch]:
    """Endless micro batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.micro_batch, shape.sequence + 1)
    while True:
        yield make_batch(torch.randint(shape.vocabulary, size, generator=generator), eod=0, eod_mask_loss=False)


def ours(shape: Shape, precision: str, *, compiled: bool = False) -> Step:
    """A step of our engine through DeepSpeed, by wish with its blocks through torch.compile."""
    settings = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "seq_length": shape.sequence,
        "max_position_embeddings": shape.sequence,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "gpt_j_residual": True,
        "no_weight_tying": True,
        "precision": precision,
        "compile": compiled,
        "zero_optimization": {"stage": 0 if precision == "fp32" else 1},
        "optimizer": {"type": "Adam", "params": {"lr": RATE, "betas": [0.9, 0.95]}},
        "train_micro_batch_size_per_gpu": shape.micro_batch,
        "train_iters": 1000,
        "tokenizer_type": "CharLevelTokenizer",
        "data_path": "none",
    }
    config = resolve([], settings, Resources(1)).config
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1)
    engine = build_training_engine(config, topology, padded_vocab_size=shape.vocabulary)
    source = batches(shape)
    return lambda: float(engine.train_step(source, RATE).loss)


def plain_loop(model: torch.nn.Module, forward: Callable[[Tensor], Tensor], shape: Shape) -> Step:
    """A step without an engine: AdamW with fp32 master weights, clipping at 1.0.

    Args:
        model: Owns the parameters.
        forward: Tokens [b, s] -> logits [b, s, v].
        shape: Sizes of the batches.
    """
    parameters = list(model.parameters())
    masters = parameters if parameters[0].dtype == torch.float32 else [p.detach().float().clone() for p in parameters]
    groups = [
        {"params": [master for master in masters if master.dim() > 1], "weight_decay": 0.1},
        {"params": [master for master in masters if master.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    source = batches(shape)

    def step() -> float:
        batch = next(source).to(device())
        logits = forward(batch.tokens)
        loss = torch.nn.functional.cross_entropy(logits.float().view(-1, shape.vocabulary), batch.labels.view(-1))
        loss.backward()
        if masters is not parameters:
            _accumulate(parameters, masters)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=masters is parameters)
        if masters is not parameters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        return float(loss.detach())

    return step


def _accumulate(parameters: list[torch.nn.Parameter], masters: list[Tensor]) -> None:
    """Adds the bfloat16 gradients of one micro batch to fp32 ones."""
    for parameter, master in zip(parameters, masters, strict=True):
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        assert parameter.grad is not None
        master.grad.add_(parameter.grad)
        parameter.grad = None
