"""Our training step through DeepSpeed beside a plain loop over transformers' GPT-NeoX, in one process.

    python benchmarks/train_step.py [--pairs 15]

Same shapes, optimizer and precision on both sides: parallel residual, rotary over a quarter of each head, gelu, biases,
untied head, AdamW, clipping at 1.0. In bfloat16 both sides keep fp32 master weights and accumulate gradients in fp32.
Steps alternate (ours, theirs, ours, ...), so that a machine whose speed drifts slows both; the figure is the median of
the ratios of neighbouring steps. On a GPU the same comparison runs there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config import Resources, resolve
from megatron.data.batch import MicroBatch, make_batch
from megatron.engine.build import DTYPES, build_training_engine
from megatron.parallel.bootstrap import bootstrap, device, shutdown

LAYERS, HIDDEN, HEADS, SEQUENCE, MICRO_BATCH = 4, 256, 8, 512, 4
RATE = 1e-4


def batches(vocabulary: int) -> Iterator[MicroBatch]:
    """Endless micro batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield make_batch(
            torch.randint(vocabulary, (MICRO_BATCH, SEQUENCE + 1), generator=generator), eod=0, eod_mask_loss=False
        )


def ours(vocabulary: int, precision: str) -> Callable[[], float]:
    """One step of our engine; returns its loss."""
    settings = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "seq_length": SEQUENCE,
        "max_position_embeddings": SEQUENCE,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "gpt_j_residual": True,
        "no_weight_tying": True,
        "precision": precision,
        "zero_optimization": {"stage": 0 if precision == "fp32" else 1},
        "optimizer": {"type": "Adam", "params": {"lr": RATE, "betas": [0.9, 0.95]}},
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "train_iters": 1000,
        "tokenizer_type": "CharLevelTokenizer",
        "data_path": "none",
    }
    config = resolve([], settings, Resources(1)).config
    topology = bootstrap(pipe_parallel_size=0, model_parallel_size=1, seed=1)
    engine = build_training_engine(config, topology, padded_vocab_size=vocabulary)
    source = batches(vocabulary)
    return lambda: float(engine.train_step(source, RATE).loss)


def theirs(vocabulary: int, precision: str) -> Callable[[], float]:
    """One step of the plain loop; returns its loss."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=SEQUENCE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_cache=False,
        attn_implementation="sdpa",
    )
    dtype = DTYPES[precision]
    model = GPTNeoXForCausalLM(shape).to(device(), dtype).train()
    parameters = list(model.parameters())
    masters = parameters if dtype == torch.float32 else [p.detach().float().clone() for p in parameters]
    decayed = [m for m in masters if m.dim() > 1]
    plain = [m for m in masters if m.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    source = batches(vocabulary)

    def step() -> float:
        batch = next(source).to(device())
        logits = model(batch.tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().view(-1, vocabulary), batch.labels.view(-1))
        loss.backward()
        if dtype != torch.float32:
            _accumulate(parameters, masters)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=dtype == torch.float32)
        if dtype != torch.float32:
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


def seconds(step: Callable[[], float]) -> float:
    """Wall time of one step, the device's work included."""
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(vocabulary: int, precision: str, pairs: int) -> tuple[float, float, float]:
    """Median ratio (theirs / ours: above 1 we are faster) and the median seconds of each."""
    steps = ours(vocabulary, precision), theirs(vocabulary, precision)
    for step in steps:
        for _ in range(3):
            step()
    times = [(seconds(steps[0]), seconds(steps[1])) for _ in range(pairs)]
    ratio = statistics.median(b / a for a, b in times)
    return ratio, statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


def main() -> None:
    """Prints a line for each precision and vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps that are timed")
    pairs = parser.parse_args().pairs
    tokens = MICRO_BATCH * SEQUENCE
    print(
        f"{LAYERS} layers x {HIDDEN}, sequence {SEQUENCE}, micro batch {MICRO_BATCH}, {torch.get_num_threads()} threads"
    )
    for precision, vocabulary in itertools.product(("fp32", "bfloat16"), (512, 50304)):
        ratio, mine, other = compare(vocabulary, precision, pairs)
        print(
            f"{precision:9s} vocabulary {vocabulary:6d}: {ratio:5.2f}x the tokens/s of transformers "
            f"({tokens / mine:,.0f} against {tokens / other:,.0f} tokens/s, {pairs} pairs)",
            flush=True,
        )
    shutdown()


if __name__ == "__main__":
    main()
