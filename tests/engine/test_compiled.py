"""`compile` changes no number: losses, norms and dropout masks are those of the blocks as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import run, series

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
TENSOR = {"model_parallel_size": 2, "sequence_parallel": True}
EXPERTS = {"moe_num_experts": 4, "moe_expert_interval": 2, "moe_router_type": "topk"}
SHORT = {"train_iters": 4, "eval_interval": 2, "eval_iters": 1}
CASES: list[Any] = [
    pytest.param(
        2, {**TENSOR, **DROPOUT, "checkpoint_activations": True}, id="tensor 2, sequence, recomputed, dropout"
    ),
    *(
        pytest.param(world_size, settings, id=name, marks=pytest.mark.long)
        for name, world_size, settings in (
            ("pipeline 2", 2, {"pipe_parallel_size": 2}),
            ("data 2, ZeRO 3", 2, {"zero_optimization": {"stage": 3}}),
            ("context 2, ZeRO 1", 2, {"context_parallel_size": 2, "zero_optimization": {"stage": 1}}),
            ("ring 2", 2, {"context_parallel_size": 2, "context_parallel_method": "ring", "num_kv_heads": 1}),
            ("core recomputed", 1, {"recompute_granularity": "selective"}),
            ("experts", 1, EXPERTS),
            ("sparse", 1, {"attention_config": [[["bigbird", "global"], 2]], "sparsity_config": {"block": 8}}),
            ("positions in the scores", 1, {"pos_emb": "rpe"}),
            ("values of the first block", 1, {"value_residual": True}),
            ("deep", 1, {"num_layers": 12, "gpt_j_residual": True, "norm": "layernorm"}),
        )
    ),
]


@pytest.mark.parametrize(("world_size", "settings"), CASES)
def test_compiled_blocks_compute_the_same(
    world_size: int, settings: dict[str, Any], dataset: str, tmp_path: Path
) -> None:
    """Within 1e-6 of the losses and 1e-5 of the norms: a compiler may add in another order."""
    keys = {"data_path": dataset, **SHORT, **settings}
    plain = run(world_size, tmp_path / "plain", **keys)
    compiled = run(world_size, tmp_path / "compiled", compile=True, timeout=600, **keys)
    for name in ("train/lm_loss", "validation/lm_loss"):
        assert series(compiled, name) == pytest.approx(series(plain, name), rel=1e-6), name
    assert series(compiled, "train/grad_norm") == pytest.approx(series(plain, "train/grad_norm"), rel=1e-5)


def test_a_run_that_compiles_nothing_does_not_import_the_compiler() -> None:
    """Importing torch.compile's frontend takes a second, which generation and evaluation need not wait."""
    program = "import sys, megatron.training.trainer; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
