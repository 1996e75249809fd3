"""Run directories as training leaves them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron.metrics.sinks.jsonl import JsonLines


def make_run(folder: Path, *, iterations: int = 50, scale: float = 1.0, **config: Any) -> Path:
    """A run directory with metrics of so many iterations, the ranks' last report and a configuration."""
    folder.mkdir(parents=True)
    sink = JsonLines(folder / "metrics.jsonl")
    for iteration in range(1, iterations + 1):
        loss = scale * (2 + 6 * math.exp(-iteration / 20))
        sink.write(
            iteration, {"train/lm_loss": loss, "train/learning_rate": 1e-3, "consumed_tokens": iteration * 4096.0}
        )
        if iteration % 10 == 0:
            sink.write(iteration, {"validation/lm_loss": loss + 0.1})
    sink.close()
    ranks = {"iteration": iterations, "host": ["a", "b"], "data_wait": [0.001, 0.2], "probe": [0.001, 0.002]}
    (folder / "ranks.jsonl").write_text(json.dumps(ranks) + "\n")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "log_dir": str(folder), **config}))
    return folder
