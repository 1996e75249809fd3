"""The coordinate check: slopes of a small model with muP and without, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Config, Resources, resolve
from megatron.param_table import MupWidths
from megatron.plan.base_shapes import write_base_shapes
from megatron.training.mup.activation_stats import Curves, slope
from megatron.training.mup.coord_check import at_width, coord_check
from tests.multi_rank import run_distributed

KEYS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "tokenizer_type": "CharLevelTokenizer",
    "train_batch_size": 8,
    "train_iters": 10,
    "precision": "fp32",
    "gradient_clipping": 0.0,
    "num_workers": 0,
    "distributed_backend": "gloo",
}
OPTIMIZERS = {
    "adam": {"type": "Adam", "params": {"lr": 0.01}},
    "sgd": {"type": "SGD", "params": {"lr": 1.0}},
}
FLAT, GROWS = {"adam": 0.2, "sgd": 0.3}, 0.6
"""Slopes: 0 is flat and 1 grows like the width. A width of 32 is far from the limit, hence the room."""


def config_of(folder: Path, world: int = 1, **changes: Any) -> Config:
    path = str(folder / "base.json")
    write_base_shapes(resolve([], {**KEYS, "save_base_shapes": True, "base_shapes_file": path}).config)
    keys = {**KEYS, "use_mup": True, "coord_check": True, "base_shapes_file": path, "log_dir": str(folder), **changes}
    return resolve([], keys, Resources(world)).config


def check(rank: int, world_size: int, config: Config) -> None:
    coord_check(config)


@pytest.fixture(scope="module")
def alone(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of what one process found, by optimizer."""
    folders = {kind: tmp_path_factory.mktemp("alone") for kind in OPTIMIZERS}
    for kind, folder in folders.items():
        config = config_of(folder, data_path=dataset, optimizer=OPTIMIZERS[kind])
        run_distributed(check, 1, config, timeout=300)
    return folders


def found_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "coord_check.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sizes_are_flat_with_mup_and_grow_without(kind: str, alone: dict[str, Path]) -> None:
    """Sizes at every step, and what the steps change; logits get their size by what they learn."""
    reported = found_in(alone[kind])
    assert reported["widths"] == [32, 64, 128, 256]
    mup, standard = reported["muP"], reported["standard"]
    assert mup["logits"]["slopes"][0] == pytest.approx(-0.5, abs=0.1)
    for part, found in mup.items():
        if part != "logits":
            assert all(abs(each) < FLAT[kind] for each in found["slopes"] + found["change_slopes"]), (part, found)
    assert all(standard[part]["change_slopes"][-1] > GROWS for part in ("block 0 mlp", "block 1 attention", "block 1"))
    if kind == "adam":  # which has learned more by then
        assert all(abs(mup["logits"][name][-1]) < FLAT[kind] for name in ("slopes", "change_slopes"))
        assert standard["logits"]["change_slopes"][-1] > GROWS
    assert (alone[kind] / "coord_check.png").stat().st_size > 10_000


def test_ranks_measure_together(alone: dict[str, Path], dataset: str, tmp_path: Path) -> None:
    """Two tensor-parallel ranks with sequence parallelism, each with a part of the activations, find what one does."""
    layout = {"model_parallel_size": 2, "sequence_parallel": True}
    config = config_of(tmp_path, 2, data_path=dataset, optimizer=OPTIMIZERS["adam"], **layout)
    run_distributed(check, 2, config, timeout=300)
    together = found_in(tmp_path)["muP"]
    for part, one in found_in(alone["adam"])["muP"].items():
        for kind in ("sizes", "changes"):
            for a, b in zip(one[kind], together[part][kind], strict=True):
                assert a == pytest.approx(b, rel=1e-3), (part, kind)


def test_models_are_as_wide_as_the_base_times_a_factor(tmp_path: Path) -> None:
    """More heads, or wider ones where the model has as many as its base; key heads and a gated MLP grow along."""
    base = MupWidths(hidden_size=32, num_attention_heads=4, num_kv_heads=2, head_dim=8, mlp_width=40)
    config = config_of(tmp_path).replace(activation="swiglu", num_kv_heads=2)
    for heads, width in ((4, 8), (16, 8), (4, 32)):
        made = at_width(config.replace(num_attention_heads=heads, kv_channels=width), base, 4).model
        expected = (4, 2, 32) if width != 8 else (16, 8, 8)
        assert (made.num_attention_heads, made.num_kv_heads, made.kv_channels) == expected
        assert (made.hidden_size, made.mlp_width) == (128, 160)


def test_slopes_are_those_of_powers() -> None:
    widths = (2, 4, 8, 16)
    for power in (-0.5, 0.0, 1.0):
        assert slope(widths, [3 * width**power for width in widths]) == pytest.approx(power)
    assert math.isnan(slope(widths, [1, 2, math.inf, 3]))
    start = ({"a": 1.0}, {"a": 0.0})
    curves = Curves.of({8: [start, ({"a": 8.0}, {"a": 2.0})], 2: [start, ({"a": 2.0}, {"a": 4.0})]})
    assert curves.slopes()["a"] == pytest.approx((0.0, 1.0))
    assert curves.slopes(of_changes=True)["a"] == pytest.approx((-0.5,))
