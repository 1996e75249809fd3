"""Seconds from `./deepy.py train.py` to the first finished iteration, on this machine's CPU.

    python benchmarks/startup.py [--workers 2] [--runs 3]

The model is tiny, so this is the launcher, the imports, the process group, DeepSpeed's engine and one step. The
one-time compilation of CPU kernels is done by a first launch that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.data.indexed.writer import DatasetWriter  # noqa: E402 (the checkout is on the path only now)

SETTINGS = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "tokenizer_type": "CharLevelTokenizer",
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3}},
    "precision": "bfloat16",
    "split": "1,0,0",
    "eval_iters": 0,
    "data_path": "text",
}


def seconds_to_first_iteration(folder: Path, workers: int) -> float:
    """One launch; wall time until the line of iteration 1 is on the terminal."""
    command = [sys.executable, str(ROOT / "deepy.py"), "train.py", "run.json", "--num-gpus", str(workers)]
    started = time.perf_counter()
    environment = {**os.environ, "NEOX_TTY": "0"}
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("iteration 1/"):
                return time.perf_counter() - started
    raise SystemExit("the run ended before its first iteration")


def main() -> None:
    """Prints the median over some launches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="launches that are counted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with DatasetWriter(folder / "text", numpy.dtype(numpy.uint16)) as writer:
            writer.add_document(numpy.arange(10_000) % 251)
        (folder / "run.json").write_text(json.dumps(SETTINGS))
        seconds_to_first_iteration(folder, options.workers)
        times = [seconds_to_first_iteration(folder, options.workers) for _ in range(options.runs)]
    print(
        f"{options.workers} workers: first iteration after {statistics.median(times):.1f} s (median of {options.runs})"
    )


if __name__ == "__main__":
    main()
