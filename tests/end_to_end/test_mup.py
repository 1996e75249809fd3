"""muP in every layout, through checkpoints, in generation and for transformers.

What it computes is compared with the authors' package in tests/model/test_mup.py; here several ranks are compared with
one process, and a folder of transformers, into whose weights the factors have gone, with the model that has them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.load.loader import find_checkpoint
from megatron.checkpoint.load.stored_model import open_model
from megatron.checkpoint.save.saver import Counters, Saver
from megatron.config import Resources, resolve
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_inference_engine, build_training_engine
from megatron.errors import ConfigError
from megatron.param_table import ModelDims, tensors
from megatron.plan.base_shapes import write_base_shapes
from tests.end_to_end.engines import BASE, LENGTH, PIPELINE, SAVED, TENSOR, VOCABULARY, Curves, agree, train
from tests.multi_rank import run_distributed
from tests.options import Keys

NARROW: Keys = {"hidden_size": 32, "num_attention_heads": 4}
SGD: Keys = {"optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}}
LLAMA: Keys = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "mlp_multiple_of": 8,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "no_weight_tying": True,
}
EXPERTS: Keys = {
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_router_type": "topk",
    "moe_normalize_top_k": True,
}
FACTORS: Keys = {"mup_attn_temp": 0.5, "mup_output_temp": 0.5, "mup_embedding_mult": 2.0, "mup_init_scale": 1.5}
CASES: dict[str, tuple[Keys, Keys]] = {
    "tied, wider heads": ({"pos_emb": "learned", **FACTORS}, {"hidden_size": 64}),
    "untied, more heads, by gradient": (
        {**LLAMA, **SGD},
        {"hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 4},
    ),
    "experts": (
        {**LLAMA, **EXPERTS, **FACTORS, "intermediate_size": 96},
        {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 288},
    ),
    "relative positions": ({"pos_emb": "rpe", "mup_rp_embedding_mult": 2.0, **FACTORS}, {"num_attention_heads": 8}),
    "queries and keys": ({"use_qk_layernorm": True, **LLAMA, **FACTORS}, {"hidden_size": 64, "num_kv_heads": 2}),
    "parallel": ({"gpt_j_residual": True, "gpt_j_tied": True, "no_weight_tying": True, **FACTORS}, {}),
    "alibi": ({"pos_emb": "alibi", "use_bias_in_norms": False}, {"hidden_size": 64}),
}
"""Name -> what the model is made of, and how it is wider than its base, whose heads have 8 features."""


def case_of(name: str, folder: Path) -> Keys:
    """The keys of a case, whose base is written into the folder."""
    parts, wide = CASES[name]
    path = str(folder / f"{name}.json")
    base = {key: value for key, value in parts.items() if not key.startswith("mup_")}
    written = {**BASE, **NARROW, **base, "num_kv_heads": wide.get("num_kv_heads") and 2}
    written = {key: value for key, value in written.items() if value is not None}
    write_base_shapes(resolve([], {**written, "save_base_shapes": True, "base_shapes_file": path}).config)
    return {**BASE, **NARROW, **parts, **wide, "use_mup": True, "base_shapes_file": path}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Keys]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: case_of(name, folder) for name in CASES}


@pytest.fixture(scope="module")
def single(cases: dict[str, Keys]) -> Curves:
    return run_distributed(train, 1, cases, {}, timeout=300)[0]


def run(cases: dict[str, Keys], layout: Keys, folder: Path | str = "", *, resumed: bool = False) -> Curves:
    found: list[Curves] = run_distributed(train, 2, cases, layout, str(folder), resumed, timeout=400)
    return found[0]


def test_tensor_ranks_are_one_process_and_a_pipeline_goes_on(
    cases: dict[str, Keys], single: Curves, tmp_path: Path
) -> None:
    """Losses at 1e-5. The pipeline loads what tensor parallelism saved, weights and optimizer."""
    assert all(curve[-1][0] < curve[0][0] for curve in single.values())
    agree(run(cases, TENSOR, tmp_path), single)
    later = {name: curve[SAVED:] for name, curve in single.items()}
    agree(run(cases, PIPELINE, tmp_path, resumed=True), later)


@pytest.mark.parametrize(
    "layout",
    [
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 3}},
        {**PIPELINE, "zero_optimization": {"stage": 1}},
    ],
    ids=["zero1", "zero3", "pp2zero1"],
)
def test_zero_is_one_process(layout: Keys, cases: dict[str, Keys], single: Curves) -> None:
    """The stages of the pipeline have other groups of parameters, whose norms DeepSpeed sums over the stages."""
    agree(run(cases, layout), single)


@pytest.mark.parametrize("stage", [0, 1])
def test_experts_on_other_ranks_are_one_process(stage: int, cases: dict[str, Keys], single: Curves) -> None:
    """Two groups of experts, by the inputs of their matrices, that DeepSpeed knows by one name."""
    layout = {"moe_expert_parallel_size": 2, "zero_optimization": {"stage": stage}}
    agree(run({"experts": cases["experts"]}, layout), {"experts": single["experts"]})


def test_stages_without_a_table_are_one_process(tmp_path: Path) -> None:
    """Four blocks on four stages: those in the middle have a group of parameters less than the ends."""
    parts, wide = CASES["tied, wider heads"]
    path = str(tmp_path / "base.json")
    deep = {**BASE, **NARROW, "num_layers": 4, "pos_emb": "learned"}
    write_base_shapes(resolve([], {**deep, "save_base_shapes": True, "base_shapes_file": path}).config)
    cases = {"deep": {**deep, **parts, **wide, "use_mup": True, "base_shapes_file": path}}
    layout = {"pipe_parallel_size": 4, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}}
    agree(run_distributed(train, 4, cases, layout)[0], run_distributed(train, 1, cases, {})[0])


def text() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(4))


def saved_logits(rank: int, world_size: int, cases: dict[str, Keys], folder: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Saves the initial weights of each case; the logits of one text as a whole, and token by token from a cache."""
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1, backend="gloo")
    found = {}
    for name, keys in cases.items():
        config = resolve([], {**keys, "save": str(Path(folder) / name)}, Resources(1)).config
        trained = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
        Saver(config, trained, padded_vocab_size=VOCABULARY).save(Counters(0, 0))
        engine = build_inference_engine(config.replace(load=config.checkpoint.save), topology, VOCABULARY)
        full = engine.logits(text()).clone()
        cache = engine.new_cache(2, LENGTH)
        steps = [engine.logits(text()[:, :5], cache)]
        steps += [engine.logits(text()[:, at : at + 1], cache) for at in range(5, LENGTH)]
        found[name] = (full, torch.cat(steps, dim=1).clone())
    return found


@pytest.fixture(scope="module")
def saved(
    cases: dict[str, Keys], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_distributed(saved_logits, 1, cases, str(folder), timeout=300)[0]


@pytest.mark.parametrize("name", CASES)
def test_cached_generation_says_what_a_full_pass_says(name: str, saved: tuple[Path, dict[str, Any]]) -> None:
    full, cached = saved[1][name]
    torch.testing.assert_close(cached, full, rtol=1e-4, atol=1e-5)


EXPORTED = {
    "tied, wider heads": "gpt2",
    "untied, more heads, by gradient": "llama",
    "experts": "mixtral",
    "queries and keys": "qwen3",
    "parallel": "neox",
}


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_says_the_same(name: str, saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The factors are in the weights: of tables, queries, router, output layer, or the final norm of a tied model."""
    folder, expected = saved
    export(open_model(folder / name), tmp_path / "theirs", family_name=EXPORTED[name])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(text()).logits, expected[name][0], rtol=1e-4, atol=1e-5)


def test_a_temperature_of_alibi_has_no_weight_to_go_into(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    stored = open_model(saved[0] / "alibi")
    hot = replace(stored, mup=stored.mup.model_copy(update={"mup_attn_temp": 2.0}))
    with pytest.raises(ConfigError, match=r"mup_attn_temp = 2\.0: transformers gives what alibi adds"):
        export(hot, tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ({}, ""),
        ({"mup_init_scale": 1.0}, ""),
        ({"mup_attn_temp": 1.0}, "mup_attn_temp = 1.0: the checkpoint"),
        ({"hidden_size": 64, "use_mup": None}, "use_mup = False: the checkpoint"),
    ],
    ids=["same", "init_scale", "attn_temp", "off"],
)
def test_weights_are_not_loaded_as_another_model(
    changes: Keys, reported: str, cases: dict[str, Keys], saved: tuple[Path, dict[str, Any]]
) -> None:
    """Factors that are not in the weights are compared with those of the run that saved them."""
    name = "tied, wider heads"
    keys = {**cases[name], **changes, "load": str(saved[0] / name), "user_script": "generate.py"}
    if changes.get("use_mup", True) is None:
        keys = {key: value for key, value in keys.items() if "mup" not in key and key != "base_shapes_file"}
    config = resolve([], keys, Resources(1)).config
    table = tensors(ModelDims.of(config.model), VOCABULARY)
    with pytest.raises(ConfigError, match=reported) if reported else nullcontext():
        assert find_checkpoint(config, table, weights_only=True) is not None
