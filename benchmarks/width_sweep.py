"""Which learning rate is best at which width, with muP and without: figure 1 of arXiv:2203.03466, small.

    make quickstart                                   # for its text and tokens, or name others
    python benchmarks/width_sweep.py [--results sweep.jsonl] [--widths 64 128 256] [--log2-rates -10 -9 ... -4]
        [--steps 200] [--tokens PREFIX --vocab-file FILE]

Every model trains alone in this process, on the same batches, and its line goes to the results as soon as it is done; a
second call goes on from there. The figure is the training loss, the mean of the last tenth of the steps. The table has
a row for each width, and marks its best rate; with muP it stays in its column.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config import Config, Resources, resolve
from megatron.config.derived.vocabulary import padded_vocab_size
from megatron.distributed.init import shutdown
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_training_engine, init_topology
from megatron.optim.lr_schedule import build as build_schedule
from megatron.optim.lr_schedule import linear
from megatron.plan.base_shapes import write_base_shapes
from megatron.tokenizers import build_tokenizer
from megatron.training.data_setup import build_run_data

HEAD = 16  # features of a head at every width
KINDS = {"muP": True, "standard": False}


def settings(asked: argparse.Namespace, width: int) -> dict[str, Any]:
    """A small Llama of that width."""
    return {
        "num_layers": 4,
        "hidden_size": width,
        "num_attention_heads": width // HEAD,
        "seq_length": 64,
        "pos_emb": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "mlp_multiple_of": 8,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        "no_weight_tying": True,
        "init_method": "small_init",
        "output_layer_init_method": "wang_init",
        "tokenizer_type": "HFTokenizer",
        "vocab_file": asked.vocab_file,
        "make_vocab_size_divisible_by": 64,
        "train_data_paths": [asked.tokens],
        "split": "100,0,0",
        "train_batch_size": 8,
        "train_iters": asked.steps,
        "num_workers": 0,
        "precision": "fp32",
        "gradient_clipping": 1.0,
        "weight_decay": 0.0,
        "distributed_backend": "gloo",
    }


def config_of(asked: argparse.Namespace, kind: str, width: int, rate: float, base: str) -> Config:
    """The configuration of one run.

    Args:
        asked: The command line.
        kind: Parametrization.
        width: Width of the model.
        rate: Learning rate.
        base: File of base shapes.
    """
    optimizer = {"type": "Adam", "params": {"lr": rate, "betas": [0.9, 0.95]}}
    keys = {**settings(asked, width), "optimizer": optimizer}
    if KINDS[kind]:
        keys |= {"use_mup": True, "base_shapes_file": base}
    return resolve([], keys, Resources(1)).config


def final_loss(config: Config, topology: Topology) -> float:
    """The mean of the last tenth of the steps' losses, infinite where it is no number. The rate falls to 0."""
    tokenizer = build_tokenizer(config.tokenizer)
    rows = padded_vocab_size(tokenizer.vocab_size, config.tokenizer.make_vocab_size_divisible_by, 1)
    train = build_run_data(config, topology, tokenizer).train
    engine = build_training_engine(config, topology, padded_vocab_size=rows, vocab_size=tokenizer.vocab_size)
    steps = config.training.train_iters
    schedule = build_schedule(linear, max_lr=config.optimizer.lr, min_lr=0.0, warmup_fraction=0.1, horizon=steps)
    batches = train.batches()
    losses = [float(engine.train_step(batches, schedule.lr(step + 1)).loss) for step in range(steps)]
    mean = sum(losses[-(steps // 10) :]) / (steps // 10)
    del engine
    gc.collect()
    return mean if math.isfinite(mean) else math.inf


def runs(asked: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Kind, width and the logarithm of the rate of every run, the narrow models first."""
    for width in asked.widths:
        for kind in KINDS:
            for power in asked.log2_rates:
                if kind == "standard" or width > asked.widths[0]:
                    yield kind, width, power


def read(path: Path) -> dict[tuple[str, int, int], float]:
    """What is done already."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(line["kind"], line["width"], line["log2_rate"]): line["loss"] for line in lines}


def table(asked: argparse.Namespace, found: dict[tuple[str, int, int], float]) -> str:
    """Losses in Markdown. The narrowest model is its own base, the same with muP and without."""
    heads = [f"2^{power}" for power in asked.log2_rates]
    lines = [f"| | width | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for kind in KINDS:
        for width in asked.widths:
            of = "standard" if width == asked.widths[0] else kind
            row = [found.get((of, width, power), math.nan) for power in asked.log2_rates]
            best = min(row)
            cells = [f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for loss in row]
            lines.append(f"| {kind} | {width} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("runs/width_sweep.jsonl"))
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help=f"multiples of {HEAD}")
    parser.add_argument("--log2-rates", type=int, nargs="+", default=[-10, -9, -8, -7, -6, -5, -4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", default="runs/quickstart/tokens/train_text_document")
    parser.add_argument("--vocab-file", default="runs/quickstart/tokenizer.json")
    asked = parser.parse_args()
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    found = read(asked.results)
    with tempfile.TemporaryDirectory() as folder:
        base = f"{folder}/base.json"
        keys = {**settings(asked, asked.widths[0]), "save_base_shapes": True, "base_shapes_file": base}
        write_base_shapes(resolve([], keys, Resources(1)).config)
        topology = init_topology(config_of(asked, "standard", asked.widths[0], 1.0, base))
        for kind, width, power in runs(asked):
            if (kind, width, power) in found:
                continue
            loss = found[kind, width, power] = final_loss(config_of(asked, kind, width, 2.0**power, base), topology)
            line = {"kind": kind, "width": width, "log2_rate": power, "loss": loss}
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    shutdown()
    print(table(asked, found))


if __name__ == "__main__":
    main()
