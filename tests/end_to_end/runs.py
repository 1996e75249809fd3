"""Small training runs for the end-to-end tests: real text of this installation, the real training path, N ranks."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron.config import Resources, resolve
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter
from megatron.metrics.sinks.jsonl import read_metrics
from megatron.training import trainer
from megatron.training.trainer import train
from tests.multi_rank import run_cases, run_distributed

BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "mlp_multiple_of": 8,
    "no_weight_tying": True,
    "tokenizer_type": "CharLevelTokenizer",
    "train_batch_size": 8,
    "train_iters": 20,
    "lr_decay_style": "cosine",
    "warmup": 0.1,
    "min_lr": 1.0e-4,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3, "betas": [0.9, 0.95], "eps": 1.0e-6}},
    "gradient_clipping": 0.5,
    "weight_decay": 0.1,
    "precision": "fp32",
    "zero_optimization": {"stage": 0},
    "split": "90,5,5",
    "num_workers": 0,
    "log_interval": 1,
    "eval_interval": 10,
    "eval_iters": 2,
    "peak_theoretical_tflops": 1.0,
}


class NeverStop:
    """Never requests a stop."""

    requested = False

    def listen(self) -> None:
        pass


def make_dataset(folder: Path) -> str:
    """A dataset of this installation's own source text, a token a byte; returns its prefix."""
    prefix = folder / "text"
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    with DatasetWriter(prefix, numpy.dtype(numpy.uint16)) as writer:
        for source in sources:
            writer.add_document(numpy.frombuffer(source.read_bytes()[:20000], dtype=numpy.uint8).astype(numpy.uint16))
    return str(prefix)


def make_documents(folder: Path, longest: int = 120) -> tuple[str, str]:
    """Documents of 3 to `longest` tokens of that text, and labels that leave out all, half or none of each.

    Returns the two prefixes.
    """
    text = IndexedDataset(make_dataset(folder)).tokens.astype(numpy.int32)
    generator = numpy.random.default_rng(0)
    with (
        DatasetWriter(folder / "short", numpy.dtype("<i4")) as tokens,
        DatasetWriter(folder / "labels", numpy.dtype("<i4")) as labels,
    ):
        for part in numpy.split(text, numpy.cumsum(generator.integers(3, longest + 1, 2000)))[:-1]:
            left_out = len(part) * generator.integers(3) // 2
            tokens.add_document(part)
            labels.add_document(numpy.where(numpy.arange(len(part)) < left_out, -100, part))
    return str(folder / "short"), str(folder / "labels")


def run_rank(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    """What one worker does: resolve, then train."""
    train(resolve([], settings, Resources(world_size)).config, NeverStop())


def run(
    world_size: int, folder: Path, *, backend: str = "gloo", timeout: float = 300, **settings: Any
) -> list[dict[str, float]]:
    """Trains on that many ranks and returns the records of its metrics file. timeout [s]: of the whole run."""
    log_dir = folder / "logs"
    values = {**BASE, "log_dir": str(log_dir), **settings}
    run_distributed(run_rank, world_size, values, timeout=timeout, backend=backend)
    return read_metrics(log_dir / "metrics.jsonl")


def run_rank_of_many(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    """The same where further runs follow in the same world, whose process group therefore stays."""
    trainer.shutdown = lambda: None
    run_rank(rank, world_size, settings)


def run_all(
    world_size: int, folder: Path, cases: Mapping[Any, dict[str, Any]], *, timeout: float = 600
) -> dict[Any, list[dict[str, float]]]:
    """Trains every case, one after the other in one world, and returns the records of each by its name."""
    values = {
        name: {**BASE, "log_dir": str(folder / f"logs{number}"), **settings}
        for number, (name, settings) in enumerate(cases.items())
    }
    run_cases({name: (run_rank_of_many, each) for name, each in values.items()}, world_size, timeout)
    return {name: read_metrics(Path(each["log_dir"]) / "metrics.jsonl") for name, each in values.items()}


def run_files_rank(rank: int, world_size: int, files: list[Path], settings: dict[str, Any]) -> None:
    """What one worker does with configuration files."""
    train(resolve([str(path) for path in files], settings, Resources(world_size)).config, NeverStop())


def run_files(files: list[Path], world_size: int, folder: Path, **settings: Any) -> list[dict[str, float]]:
    """Trains as configuration files and some flags say, and returns the records of the metrics file."""
    log_dir = folder / "logs"
    run_distributed(run_files_rank, world_size, files, {"log_dir": str(log_dir), **settings}, timeout=300)
    return read_metrics(log_dir / "metrics.jsonl")


def series(records: list[dict[str, float]], name: str) -> list[float]:
    """One metric of every record that has it, in order of iteration."""
    return [record[name] for record in records if name in record]


def same(found: list[dict[str, float]], expected: list[dict[str, float]], what: str, start: int = 0) -> None:
    """Losses agree to 1e-5, norms of gradients to 1e-4. start: the first expected step of training."""
    for name, tolerance in (("train/lm_loss", 1e-5), ("validation/lm_loss", 1e-5), ("train/grad_norm", 1e-4)):
        target = series(expected, name)[start if name.startswith("train") else 0 :]
        assert series(found, name) == pytest.approx(target, rel=tolerance), (what, name)
        assert target
