"""Samples a second and index maps, beside Megatron-Core's GPTDataset and compiled helpers, in one run.

    python benchmarks/sampling.py [--megatron-core DIR] [--rounds 3]

Both sides read the same files, warm in the page cache: 100 M tokens in documents of about 1,000, samples of 2,048 in
random order; then the sample index of 10 M documents and the order of a blend of 8 sets and 10 M samples. Megatron-Core
comes from the package index into DIR and runs in a process of its own, since its package is called `megatron` too. The
sides take turns, and the figure of each is the best of its rounds. "One worker" is torch's DataLoader with one worker
process for them and one reading thread here; both hand out micro batches of 4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.dataset.blend import blend_order
from megatron.data.dataset.gpt_dataset import PackedDataset, Samples
from megatron.data.dataset.index_map import build_index_map, epochs_needed, sample_starts, samples_in
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter

SEQUENCE = 2048
SAMPLES = 40_000
LOADED = 8_000
MICRO_BATCH = 4
TOKENS = 100_000_000
DOCUMENTS = 10_000_000
BLENDED = 10_000_000
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox-tests" / "megatron-core"
FASTER = {"in process": 3.0, "one worker": 3.0}  # times their speed, at least
SLOWER = {"sample index": 1.2, "blend": 2.0}  # times their time, at most


def best(function: Callable[[], object], repeats: int = 1) -> float:
    """The least of some wall times [s]."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def write_documents(prefix: Path) -> IndexedDataset:
    """100 M tokens in documents of 1 to about 20,000 tokens, 1,000 on average."""
    generator = np.random.default_rng(0)
    lengths = np.maximum(generator.lognormal(6.2, 1.2, TOKENS // 1000), 1).astype(np.int64)
    with DatasetWriter(prefix, np.dtype("<u2")) as writer:
        for length in lengths.tolist():
            writer.add_document(generator.integers(1, 50_257, length, dtype=np.uint16))
    return IndexedDataset(prefix)


def fetch(folder: Path) -> Path:
    """The folder that holds Megatron-Core, fetched once."""
    if not (folder / "megatron" / "core").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*install, "megatron-core"], check=True)
    return folder


def theirs(package: Path, folder: Path) -> dict[str, float]:
    """One round of Megatron-Core."""
    script = Path(__file__).resolve().parents[1] / "tests/data/megatron_core_speed.py"
    environment = os.environ | {"PYTHONPATH": str(package), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", str(script), str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def ours(samples: Samples, folder: Path, weights: list[float], repeats: int) -> dict[str, float]:
    """One round of this project.

    Args:
        samples: The data set.
        folder: Folder for files.
        weights: Weights of the data sets of a blend.
        repeats: How often a time is measured.
    """
    order = np.random.default_rng(0).permutation(len(samples))[:SAMPLES].tolist()
    tokens = np.empty(samples.sample_length, np.int64)

    def read() -> None:
        for number in order:
            samples.read(number, tokens)

    def load() -> None:
        # The map itself is shuffled, so consecutive numbers are random samples.
        for _ in BatchLoader(samples, BatchSampler(LOADED, MICRO_BATCH, 0, 1), eod=0, workers=1).batches():
            pass

    documents = np.load(folder / "documents.npz")
    sizes, epoch = documents["sizes"], documents["order"]
    count = samples_in(int(sizes.sum(dtype=np.int64)), SEQUENCE, 1)
    return {
        "in process": len(order) / best(read, repeats),
        "one worker": LOADED / best(load, repeats),
        "sample index": best(lambda: sample_starts(sizes, epoch, seq_length=SEQUENCE, count=count), repeats),
        "blend": best(lambda: blend_order(weights, BLENDED), repeats),
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each figure; 1 when one is below what is promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megatron-core", type=Path, default=CACHE, metavar="DIR", help="where it is installed")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--repeats", type=int, default=2, help="measurements in a turn")
    asked = parser.parse_args(arguments)
    package = fetch(asked.megatron_core)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = write_documents(folder / "text")
        epochs = epochs_needed(len(dataset.tokens), SEQUENCE, SAMPLES)
        index = build_index_map(dataset.sizes, range(len(dataset)), seq_length=SEQUENCE, epochs=epochs, seed=1)
        generator = np.random.default_rng(1)
        order = np.arange(DOCUMENTS, dtype=np.int32)
        generator.shuffle(order)
        np.savez(folder / "documents.npz", sizes=generator.integers(100, 2000, DOCUMENTS).astype(np.int32), order=order)
        settings = {
            "prefix": str(folder / "text"),
            "cache": str(folder / "cache"),
            "seq_length": SEQUENCE,
            "samples": SAMPLES,
            "loaded": LOADED,
            "micro_batch": MICRO_BATCH,
            "blended": BLENDED,
            "weights": generator.dirichlet(np.ones(8)).tolist(),
            "repeats": asked.repeats,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        rounds = []
        for _ in range(asked.rounds):
            mine = ours(PackedDataset(dataset, index, SEQUENCE), folder, settings["weights"], asked.repeats)
            rounds.append((mine, theirs(package, folder)))
        promises_hold = True
        for figure, least in FASTER.items():
            mine, other = (max(one[side][figure] for one in rounds) for side in (0, 1))
            promises_hold &= mine >= least * other
            print(f"samples/s {figure}: {mine:,.0f} against {other:,.0f}, {mine / other:.1f}x (promised: {least:.1f}x)")
        for figure, most in SLOWER.items():
            mine, other = (min(one[side][figure] for one in rounds) for side in (0, 1))
            promises_hold &= mine <= most * other
            print(f"{figure} of 10 M: {mine:.2f} s against {other:.2f} s, {mine / other:.2f}x (promised: {most:.1f}x)")
    return int(not promises_hold)


if __name__ == "__main__":
    sys.exit(main())
