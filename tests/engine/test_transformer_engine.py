"""Layers of Transformer Engine in every layout: through a stand-in here, through the package under the marker `gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config import Resources, resolve
from megatron.errors import ConfigError
from megatron.metrics.sinks.jsonl import read_metrics
from megatron.training.trainer import train
from tests.end_to_end.runs import BASE, NeverStop, run, series
from tests.engine import stand_in
from tests.multi_rank import run_distributed

LAYERS = {"te_columnparallel": True, "te_rowparallel": True, "te_mha": True, "te_layernorm_mlp": True}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"norm": "layernorm", "activation": "gelu_tanh", "num_kv_heads": None},
    "llama": {"activation": "silu", "use_bias_in_attn_linear": False, "use_bias_in_mlp": False},
    "window": {"activation": "relu", "sliding_window_width": 7},
    "neox": {"norm": "layernorm", "activation": "gelu_tanh", "gpt_j_residual": True, "num_kv_heads": None},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor 2": (2, {"model_parallel_size": 2}),
    "tensor 2, sequence": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "pipeline 2": (2, {"pipe_parallel_size": 2}),
    "context 2, ZeRO 1": (2, {"context_parallel_size": 2, "zero_optimization": {"stage": 1}}),
    "data 2, ZeRO 3": (2, {"zero_optimization": {"stage": 3}}),
    "recomputed": (1, {"checkpoint_activations": True}),
    "core recomputed": (1, {"recompute_granularity": "selective"}),
}
SHORT = {"train_iters": 4, "eval_interval": 2, "eval_iters": 1}


def with_stand_in(rank: int, world_size: int, settings: dict[str, Any]) -> stand_in.Seen:
    seen = stand_in.install()
    train(resolve([], settings, Resources(world_size)).config, NeverStop())
    return seen


def run_with_stand_in(
    world_size: int, folder: Path, **settings: Any
) -> tuple[list[dict[str, float]], list[stand_in.Seen]]:
    values = {**BASE, "log_dir": str(folder), **settings}
    seen = run_distributed(with_stand_in, world_size, values, timeout=300)
    return read_metrics(folder / "metrics.jsonl"), seen


def compare(settings: dict[str, Any], world_size: int, folder: Path, **layers: Any) -> list[stand_in.Seen]:
    """Trains with and without the layers, and holds the losses against each other."""
    ours = run(world_size, folder / "ours", **settings)
    theirs, seen = run_with_stand_in(world_size, folder / "theirs", **settings, **layers)
    for name in ("train/lm_loss", "validation/lm_loss", "train/grad_norm"):
        assert series(theirs, name) == pytest.approx(series(ours, name), rel=1e-5), name
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dataset: str, tmp_path: Path) -> None:
    """Models take turns, each in two layouts."""
    world_size, more = LAYOUTS[layout]
    model = list(MODELS.values())[list(LAYOUTS).index(layout) % len(MODELS)]
    for seen in compare({"data_path": dataset, **SHORT, **model, **more}, world_size, tmp_path, **LAYERS):
        assert seen.calls.keys() == {"Linear", "DotProductAttention", "LayerNormMLP"}
        assert not seen.in_fp8


@pytest.mark.parametrize("model", MODELS)
def test_models(model: str, dataset: str, tmp_path: Path) -> None:
    settings = {"data_path": dataset, **SHORT, **MODELS[model], "model_parallel_size": 2}
    compare(settings, 2, tmp_path, **LAYERS)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"te_columnparallel": True}, {"Linear": 2}),
        ({"te_rowparallel": True}, {"Linear": 2}),
        ({"te_mha": True}, {"Linear": 2, "DotProductAttention": 1}),
        ({"te_layernorm_mlp": True}, {"LayerNormMLP": 1}),
        (LAYERS, {"Linear": 2, "DotProductAttention": 1, "LayerNormMLP": 1}),
    ],
    ids=["columns", "rows", "attention", "norm and MLP", "all"],
)
def test_each_key_takes_its_layers(
    layers: dict[str, Any], expected: dict[str, int], dataset: str, tmp_path: Path
) -> None:
    """In calls of one forward pass of one block."""
    settings = {"data_path": dataset, "train_iters": 1, "eval_iters": 0, **MODELS["llama"], **layers}
    (seen,) = run_with_stand_in(1, tmp_path, **settings)[1]
    assert seen.calls == {name: calls * BASE["num_layers"] for name, calls in expected.items()}


def test_fp8_is_for_training_steps(dataset: str, tmp_path: Path) -> None:
    """Within the region of the recipe, and outside of it where the model is evaluated."""
    recipe = {"te_fp8_format": "e4m3", "te_fp8_amax_history_len": 4, "te_fp8_amax_compute_algo": "max"}
    settings = {"data_path": dataset, **SHORT, **MODELS["llama"], "mlp_multiple_of": 16, "te_fp8_margin": 1, **recipe}
    for seen in run_with_stand_in(2, tmp_path, model_parallel_size=2, te_fp8_mha=True, **settings, **LAYERS)[1]:
        blocks = BASE["num_layers"]
        assert seen.in_fp8["LayerNormMLP"] == SHORT["train_iters"] * blocks
        assert seen.calls["LayerNormMLP"] == 3 * blocks  # two validations and the test
        assert seen.recipe == {
            "margin": 1,
            "fp8_format": "E4M3",
            "amax_history_len": 4,
            "amax_compute_algo": "max",
            "reduce_amax": True,
            "fp8_dpa": True,
        }


def test_a_missing_package_is_named(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"te_mha.*pip install neox\[transformer-engine\]"):
        run(1, tmp_path, data_path=dataset, **MODELS["llama"], te_mha=True)


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"activation": "swiglu"}, "it has no swiglu"),
        ({"norm": "scalenorm"}, "it computes layernorm with a bias, and rmsnorm"),
        ({"norm": "layernorm", "use_bias_in_norms": False}, "it computes layernorm with a bias"),
        ({"gpt_j_residual": True, "gpt_j_tied": True}, "attention reads the same norm"),
        ({"moe_num_experts": 4}, "blocks with experts have no MLP"),
        ({"lora": {"rank": 4, "targets": "all"}}, "low-rank updates cannot be added within it"),
        ({"te_fp8_mha": True, "te_fp8_wgrad": False}, "te_fp8_wgrad = False: since its version 2"),
        ({"te_fp8_mha": True, "checkpoint_activations": True}, "would count twice in the scales"),
        ({"te_fp8_mha": True, "te_layernorm_mlp": False}, "no layer is Transformer Engine's"),
        ({"te_fp8_mha": True, "seq_length": 33, "train_batch_size": 4}, "numbers of tokens that divide by 8"),
        ({"te_fp8_mha": True, "hidden_size": 72}, "hidden_size is 72"),
        ({"te_fp8_amax_history_len": 0}, "at least one step"),
    ],
)
def test_what_it_cannot_do_is_refused(settings: dict[str, Any], reported: str) -> None:
    base = {"data_path": "text", "activation": "silu", "te_layernorm_mlp": True, "max_position_embeddings": 64}
    with pytest.raises(ConfigError) as refused:
        resolve([], {**BASE, **base, **settings}, Resources(1))
    assert reported in str(refused.value)
