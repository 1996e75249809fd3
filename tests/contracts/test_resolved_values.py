"""The resolved values of a configuration of every kind, which must not move unseen.

`python -m tests.contracts.test_resolved_values` writes the file anew; its changes are then reviewed like code.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Resources, resolve

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
GOLDEN = HERE / "resolved_values.json"

RUNS: dict[str, int] = {
    "125M": 8,
    "175B": 1024,
    "20B": 96,
    "pythia/14M": 32,
    "pythia/1B": 64,
    "pythia/12B": 256,
    "llama/7B": 128,
    "llama3/70B": 1024,
    "mistral/7B": 128,
    "cpu/two_workers": 2,
    "moe/125M-8-experts": 8,
    "mamba/130M": 8,
    "rwkv/169M": 8,
}

PINNED = (
    "world_size",
    "pipe_parallel_size",
    "model_parallel_size",
    "is_pipe_parallel",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "precision",
    "fp16",
    "bf16",
    "data_types",
    "zero_stage",
    "optimizer_type",
    "lr",
    "min_lr",
    "weight_decay",
    "gradient_clipping",
    "lr_decay_style",
    "lr_decay_iters",
    "warmup",
    "num_kv_heads",
    "kv_channels",
    "max_position_embeddings",
    "distributed_backend",
)


def values(name: str) -> dict[str, Any]:
    accelerator = "cpu" if name.startswith("cpu/") else "cuda"
    config = resolve([CONFIGS / f"{name}.yml"], {}, Resources(RUNS[name], accelerator)).config  # type: ignore[arg-type]
    flat = config.flat()
    return {**{key: flat[key] for key in PINNED}, "mlp_width": config.model.mlp_width}


@pytest.mark.parametrize("name", RUNS)
def test_values_stand(name: str) -> None:
    assert values(name) == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: values(name) for name in RUNS}, indent=1) + "\n", encoding="utf-8")
