#!/usr/bin/env python
"""Time of a training step of an encoder, against transformers and with other samples, in turns on one core.

    OMP_NUM_THREADS=1 python benchmarks/encoder.py

Compares MegatronBertForPreTraining with AdamW on the same shapes, and documents of 24 to 90 tokens that are packed into
samples with as many that are padded. Prints the least processor time of a step [ms] and the ratios.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import MegatronBertConfig, MegatronBertForPreTraining

from megatron.config import Resources, resolve
from megatron.data.dataset.document_starts import document_starts
from megatron.distributed.mesh import Topology
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.objectives.masked_language_model import MaskedLanguageModel

VOCABULARY, LAYERS, HIDDEN, HEADS, LENGTH, BATCH = 8192, 4, 256, 4, 128, 16
TURNS, MASKED = 8, 0.15
ENCODER = {
    "train_impl": "bert",
    "pack_impl": "unpacked",
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "seq_length": LENGTH,
    "pos_emb": "learned",
    "precision": "fp32",
    "train_micro_batch_size_per_gpu": BATCH,
    "train_iters": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-4}},
}


def encoder() -> SequentialModel:
    """Returns our model, as a configuration without dropout builds it."""
    config = resolve([], ENCODER, Resources(1)).config
    spec = ModelSpec(
        config.model,
        config.initialization,
        config.kernels,
        padded_vocab_size=VOCABULARY,
        topology=Topology.single(),
        seed=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
        reset_attention=True,
    )
    return SequentialModel(build_layer_specs(spec)).train()


def starts_of(tokens: Tensor, ends: list[list[int]]) -> Tensor:
    """Starts of documents [b, s]; the part behind the last end is padding. ends: of the documents of each row."""
    borders = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, own in enumerate(ends):
        borders[row, [end for end in own if end < LENGTH]] = True
    return document_starts(tokens, borders, None)


def least(*steps: Callable[[], None]) -> list[float]:
    """Returns the least processor time of each step, which take turns [ms]."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(TURNS + 1):
        for step, own in zip(steps, times, strict=True):
            started = time.process_time()
            step()
            own.append(time.process_time() - started if turn else float("inf"))  # the first one warms up
    return [min(own) * 1e3 for own in times]


def main() -> None:
    """Runs the turns."""
    torch.manual_seed(0)
    tokens = torch.randint(5, VOCABULARY, (BATCH, LENGTH))
    types, order = (torch.arange(LENGTH).expand(BATCH, -1) > LENGTH // 3).long(), torch.randint(0, 2, (BATCH, 1))
    ours = encoder()
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": 4 * HIDDEN, "max_position_embeddings": LENGTH}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs = MegatronBertForPreTraining(MegatronBertConfig(**sizes, **dropout)).train()
    optimizers = {model: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for model in (ours, theirs)}
    objective = MaskedLanguageModel()

    def update(model: torch.nn.Module, loss: Tensor) -> None:
        loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    def step(starts: Tensor, mask: Tensor) -> None:
        targets = objective.targets(tokens * mask, mask.float(), tokens=mask.sum(), order=order)
        update(ours, ours(torch.stack((tokens, types)), None, starts, targets))

    def their_step(real: Tensor, mask: Tensor) -> None:
        labels = tokens.masked_fill(~mask, -100)
        given = {"token_type_ids": types, "attention_mask": real.long(), "labels": labels}
        update(theirs, theirs(tokens, **given, next_sentence_label=order.flatten()).loss)

    chosen = torch.rand(BATCH, LENGTH) < MASKED
    long, short = (torch.randint(low, high, (BATCH,)) for low, high in ((LENGTH // 2, LENGTH + 1), (24, 91)))
    real_long, real_short = (torch.arange(LENGTH) < lengths[:, None] for lengths in (long, short))
    padded, short_padded = (starts_of(tokens, lengths[:, None].tolist()) for lengths in (long, short))
    packed = starts_of(tokens, torch.randint(24, 91, (BATCH, 6)).cumsum(1).tolist())
    other, own, alone, joined = least(
        lambda: their_step(real_long, chosen & real_long),
        lambda: step(padded, chosen & real_long),
        lambda: step(short_padded, chosen & real_short),
        lambda: step(packed, chosen),
    )
    gain = (BATCH * LENGTH / joined) / (int(short.sum()) / alone)
    print(f"transformers {other:.0f} ms, ours {own:.0f} ms: {other / own:.2f}; packed {gain:.2f} times padded")


if __name__ == "__main__":
    main()
