#!/usr/bin/env python
"""Time of a training step of an encoder or encoder-decoder, against transformers, in turns on one core.

    OMP_NUM_THREADS=1 python benchmarks/encoder.py [bert | t5]

bert: compares MegatronBertForPreTraining with AdamW on the same shapes, and documents of 24 to 90 tokens that are
packed into samples with as many that are padded. t5: compares T5ForConditionalGeneration 1.1 with AdamW on the same
shapes, samples whose ends are padding. Prints the least processor time of a step [ms] and the ratios.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import MegatronBertConfig, MegatronBertForPreTraining, T5Config, T5ForConditionalGeneration

from megatron.config import Resources, resolve
from megatron.data.dataset.document_starts import document_starts
from megatron.distributed.mesh import Topology
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.objectives.language_model import LanguageModel
from megatron.objectives.masked_language_model import MaskedLanguageModel

VOCABULARY, LAYERS, HIDDEN, HEADS, LENGTH, BATCH = 8192, 4, 256, 4, 128, 16
TARGET, TURNS, MASKED = 40, 8, 0.15
ENCODER: dict[str, Any] = {
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


ENCODER_DECODER: dict[str, Any] = {
    "train_impl": "t5",
    "pack_impl": "unpacked",
    "encoder_num_layers": LAYERS // 2,
    "decoder_num_layers": LAYERS // 2,
    "encoder_seq_length": LENGTH,
    "decoder_seq_length": TARGET,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": 6 * HIDDEN,
    "pos_emb": "relative",
    "norm": "rmsnorm",
    "activation": "geglu_tanh",
    "softmax_scale": 1.0,
    "no_weight_tying": True,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    **{key: ENCODER[key] for key in ("precision", "train_micro_batch_size_per_gpu", "train_iters", "optimizer")},
}


def model_of(keys: dict[str, Any], *, reset_attention: bool = False) -> SequentialModel:
    """Returns our model, as a configuration without dropout builds it."""
    config = resolve([], keys, Resources(1)).config
    spec = ModelSpec(
        config.model,
        config.initialization,
        config.kernels,
        padded_vocab_size=VOCABULARY,
        topology=Topology.single(),
        seed=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
        reset_attention=reset_attention,
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


def bert() -> None:
    """Compares encoders."""
    torch.manual_seed(0)
    tokens = torch.randint(5, VOCABULARY, (BATCH, LENGTH))
    types, order = (torch.arange(LENGTH).expand(BATCH, -1) > LENGTH // 3).long(), torch.randint(0, 2, (BATCH, 1))
    ours = model_of(ENCODER, reset_attention=True)
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


def t5() -> None:
    """Compares encoder-decoders."""
    torch.manual_seed(0)
    source, target = torch.randint(5, VOCABULARY, (BATCH, LENGTH)), torch.randint(5, VOCABULARY, (BATCH, TARGET))
    lengths, ends = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1)), torch.randint(TARGET // 2, TARGET, (BATCH, 1))
    real, mask = torch.arange(LENGTH) < lengths, (torch.arange(TARGET) < ends).float()
    starts = torch.cat((torch.where(real, 0, lengths), torch.full((BATCH, TARGET), LENGTH)), dim=1)
    labels = torch.randint(5, VOCABULARY, (BATCH, TARGET))
    ours = model_of(ENCODER_DECODER)
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "d_kv": HIDDEN // HEADS,
        "d_ff": 2 * HIDDEN,
        "num_heads": HEADS,
    }
    sizes |= {"num_layers": LAYERS // 2, "num_decoder_layers": LAYERS // 2, "dropout_rate": 0.0}
    theirs = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())  # the class ties them
    optimizers = {model: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for model in (ours, theirs.train())}

    def update(model: torch.nn.Module, loss: Tensor) -> None:
        loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    def step() -> None:
        targets = LanguageModel().targets(labels, mask, tokens=mask.sum())
        update(ours, ours(torch.cat((source, target), dim=1), None, starts, targets))

    def their_step() -> None:
        counted = labels.masked_fill(mask == 0, -100)
        output = theirs(input_ids=source, attention_mask=real.long(), decoder_input_ids=target, labels=counted)
        update(theirs, output.loss)

    other, own = least(their_step, step)
    print(f"T5: transformers {other:.0f} ms, ours {own:.0f} ms: {other / own:.2f}")


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["bert", "t5"]
    for name, run in (("bert", bert), ("t5", t5)):
        if name in chosen:
            run()
