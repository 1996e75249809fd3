"""Low-rank updates and soft prompts in training: every layout, exact starts and resumes, what loading says, texts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.load.stored_model import StoredModel, open_model
from megatron.checkpoint.offline.merge_lora import merge
from megatron.config import Resources, resolve
from megatron.evaluation.runner import measure_text
from megatron.inference import runner as inference_run
from megatron.inference.runner import generate
from megatron.param_table import is_adapter_tensor
from megatron.registry import OPTIMIZERS
from tests.end_to_end.engines import CONTEXT, PIPELINE, RING, SAVED, TENSOR, Curves, agree, train
from tests.end_to_end.runs import BASE, run, same, series
from tests.end_to_end.test_families import LAYOUTS as FAMILY_LAYOUTS
from tests.end_to_end.test_families import MIXTURE, SHORT, cached_is_uncached, reshaped_is_the_same
from tests.end_to_end.test_optimizers import LAYOUTS as OPTIMIZER_LAYOUTS
from tests.end_to_end.test_optimizers import PARAMS, TOLERANCE
from tests.multi_rank import RankFailedError, run_distributed
from tests.options import Keys

UPDATES: Keys = {"lora": {"rank": 4, "alpha": 16, "targets": "all"}}
PROMPT: Keys = {"soft_prompt_tuning": {"num_tokens": 6}}
BOTH: Keys = {"lora": {**UPDATES["lora"], "modules_to_save": ["embedding", "head"]}}
EMBEDDING: Keys = {"lora": {**UPDATES["lora"], "modules_to_save": ["embedding"]}, "no_weight_tying": True}
HEAD: Keys = {"lora": {**UPDATES["lora"], "modules_to_save": "head"}, "no_weight_tying": True}
SOME: Keys = {"lora": {"rank": 3, "targets": ["dense", "linear1"]}}
EXPERTS: Keys = {
    **MIXTURE,
    "moe_router_type": "topk",
    "lora": {"rank": 4, "alpha": 16, "targets": ["query_key_value", "dense", "experts"]},
}
SHARED: Keys = {
    **EXPERTS,
    "activation": "swiglu",
    "mlp_multiple_of": 8,
    "moe_shared_expert_intermediate_size": 48,
    "moe_shared_expert_gate": True,
    "lora": {"rank": 4, "alpha": 16, "targets": ["dense", "shared_experts"]},
}
MIXERS = "updates, mamba2 and gated delta nets"
RWKV = "norms of rows, rwkv"
IN_ORDER = frozenset({MIXERS, RWKV})
"""These need sequences in order, and the cases of one world share their order, which is a ring's in RING."""
GATED_MLPS = "updates, gmlp and amlp"
"""These need whole sequences."""
CASES: dict[str, Keys] = {
    "updates": UPDATES,
    "updates, parallel residual, grouped": {**UPDATES, "gpt_j_residual": True, "num_kv_heads": 2, "pos_emb": "learned"},
    "updates of some, gated": {**SOME, "activation": "swiglu", "mlp_multiple_of": 8},
    "norms of rows, gated": {"lora": {**UPDATES["lora"], "dora": True}, "activation": "swiglu", "mlp_multiple_of": 8},
    MIXERS: {
        **UPDATES,
        "attention_config": [[["mamba2", "gated_delta_net"], "all"]],
        "pos_emb": "none",
        "mamba_num_groups": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    GATED_MLPS: {
        **UPDATES,
        "attention_config": [[["gmlp", "amlp"], "all"]],
        "activation": "gelu",
        "pos_emb": "none",
    },
    RWKV: {
        "lora": {**UPDATES["lora"], "dora": True},
        "attention_config": [[["rwkv", "global"], "all"]],
        "pos_emb": "none",
    },
    "updates of experts, gated": {**EXPERTS, "activation": "swiglu", "mlp_multiple_of": 8},
    "updates of shared experts": SHARED,
    "norms of rows of shared experts": {**SHARED, "lora": {**SHARED["lora"], "dora": True}},
    "updates of 4 bits": {"lora": {**UPDATES["lora"], "base": "nf4"}, "hidden_size": 128},
    "updates of experts of 8 bits": {
        **EXPERTS,
        "lora": {**EXPERTS["lora"], "base": "int8"},
        "hidden_size": 128,
        "activation": "swiglu",
        "mlp_multiple_of": 128,
    },
    "updates and the one matrix of both": BOTH,
    "updates, embedding": EMBEDDING,
    "updates, output layer": HEAD,
    "prompt": PROMPT,
    "prompt, relative positions": {**PROMPT, "pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 24},
    "prompt, untied": {**PROMPT, "pos_emb": "learned", "no_weight_tying": True},
}
DROPPED_BOTH: Keys = {"lora": {**BOTH["lora"], "dropout": 0.2}}
DROPPED: Keys = {"lora": {"rank": 4, "targets": "all", "dropout": 0.2}}
MEMBERS: dict[str, Keys] = {
    "updates": UPDATES,
    "updates, experts": EXPERTS,
    "updates, shared experts": SHARED,
    "updates, mamba": {**UPDATES, "attention_config": [[["mamba", "global"], "all"]], "norm": "layernorm"},
    "updates, rwkv": {**UPDATES, "attention_config": [[["rwkv"], "all"]], "pos_emb": "none", "norm": "layernorm"},
    "prompt": PROMPT,
    "prompt, rwkv": {
        **PROMPT,
        "attention_config": [[["rwkv"], "all"]],
        "activation": "gelu",
        "pos_emb": "none",
        "norm": "layernorm",
    },
}
TUNED = {"train_iters": 6, "eval_interval": 3, "eval_iters": 1, "warmup": 0.0}


@pytest.fixture(scope="module")
def base(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The save folder of a model that was trained a little."""
    folder = tmp_path_factory.mktemp("base")
    settings = {"train_iters": 8, "eval_iters": 0, "checkpoint_factor": 100, "save": str(folder / "save")}
    run(1, folder, data_path=dataset, **settings)
    return folder / "save"


@pytest.fixture
def tuning(dataset: str, base: Path) -> dict[str, Any]:
    """What the runs below have in common: they start from that model."""
    return {**TUNED, "data_path": dataset, "load": str(base), "finetune": True}


def curves(world_size: int, layout: Keys, folder: Path | None = None, *, resumed: bool = False) -> Curves:
    position = "" if folder is None else str(folder)
    left_out = {GATED_MLPS} if "context_parallel_size" in layout else set()
    left_out |= IN_ORDER if layout is RING else set()
    cases = {name: case for name, case in CASES.items() if name not in left_out}
    found: list[Curves] = run_distributed(train, world_size, cases, layout, position, resumed, timeout=400)
    return found[0]


def within(found: Curves, expected: Curves) -> None:
    """As agree, for the cases of a layout."""
    agree(found, {name: expected[name] for name in found})


@pytest.fixture(scope="module")
def alone() -> Curves:
    return curves(1, {})


def test_layouts_are_one_process(alone: Curves, tmp_path: Path) -> None:
    """A pipeline goes on from what tensor parallelism saved. In CONTEXT stage 3 of ZeRO spreads frozen weights too."""
    assert all(curve[-1][0] < curve[0][0] for curve in alone.values()), "all of them learn"
    agree(curves(2, TENSOR, tmp_path), alone)
    later = {name: curve[SAVED:] for name, curve in alone.items()}
    agree(curves(2, PIPELINE, tmp_path, resumed=True), later)
    within(curves(2, CONTEXT), alone)
    within(curves(2, RING), alone)
    agree(curves(2, {"zero_optimization": {"stage": 1}}), alone)


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        {"zero_optimization": {"stage": 2}},
        {**PIPELINE, "zero_optimization": {"stage": 1}},
        {"model_parallel_size": 2, "checkpoint_activations": True, "partition_activations": True},
        {**PIPELINE, "checkpoint_activations": True},
    ],
    ids=["zero2", "pp2zero1", "partitioned", "pp2recomputed"],
)
def test_other_layouts_are_one_process(layout: Keys, alone: Curves) -> None:
    agree(curves(2, layout), alone)


@pytest.mark.long
@pytest.mark.parametrize("member", MEMBERS)
def test_member(member: str, dataset: str, tmp_path: Path) -> None:
    """What every kind of block must do, with something trained beside it."""
    settings = {**SHORT, **MEMBERS[member], "data_path": dataset}
    save = {"save": str(tmp_path / "save"), "checkpoint_factor": 2}
    single = run(1, tmp_path / "single", **settings, **save)
    for name, (ranks, layout) in FAMILY_LAYOUTS.items():
        same(run(ranks, tmp_path / name, **settings, **layout), single, name)
    elsewhere = {"load": str(tmp_path / "save"), "iteration": 2, "zero_optimization": {"stage": 2}}
    same(run(2, tmp_path / "elsewhere", **settings, **elsewhere), single, "elsewhere", start=2)
    cached_is_uncached(settings, tmp_path / "save")
    reshaped_is_the_same(tmp_path)


def test_experts_may_be_spread_beside_updates(dataset: str, tmp_path: Path) -> None:
    settings = {**SHORT, **MEMBERS["updates, experts"], "data_path": dataset, "train_iters": 2, "eval_interval": 2}
    spread = {"moe_expert_parallel_size": 2, "zero_optimization": {"stage": 1}}
    same(run(2, tmp_path / "spread", **settings, **spread), run(1, tmp_path / "one", **settings), "spread")


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_updates_begin_as_the_model_itself(precision: str, tuning: dict[str, Any], tmp_path: Path) -> None:
    """B is zero: the first loss, and that of an evaluation at rate 0, are those of the whole model, bit by bit."""
    still = {**tuning, "precision": precision, "train_iters": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.0}}}
    still |= {"min_lr": 0.0, "weight_decay": 0.0}
    plain = run(1, tmp_path / "plain", **still)
    updated = run(1, tmp_path / "updated", **still, **UPDATES)
    for name in ("train/lm_loss", "validation/lm_loss"):
        assert series(updated, name) == series(plain, name), name


def tensors(stored: StoredModel) -> dict[str, torch.Tensor]:
    return {f"{shape.layer}.{shape.name}": stored.full_tensor(shape) for shape in stored.table}


@pytest.mark.parametrize("case", [DROPPED, PROMPT, DROPPED_BOTH], ids=["lora", "prompt", "lora and both"])
def test_resuming_is_exact_and_nothing_else_moves(
    case: Keys, tuning: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """bfloat16 on two ranks; the checkpoint holds the frozen model bit by bit, and what was trained beside it."""
    settings = {**tuning, **case, "precision": "bfloat16", "zero_optimization": {"stage": 1}}
    full = run(2, tmp_path / "whole", **settings)
    saving = {"save": str(tmp_path / "save"), "checkpoint_factor": 100}
    run(2, tmp_path / "parts", **settings, **saving, exit_interval=3)
    on = {**settings, **saving, "load": saving["save"], "finetune": False}
    resumed = run(2, tmp_path / "parts", **on)
    for name in ("train/lm_loss", "train/grad_norm", "validation/lm_loss"):
        assert series(resumed, name) == series(full, name), name
    before, after = tensors(open_model(base)), open_model(tmp_path / "save")
    added = {f"{shape.layer}.{shape.name}" for shape in after.table if is_adapter_tensor(shape)}
    found = tensors(after)
    assert found.keys() - before.keys() == added
    trained = {"0.word_embeddings.weight", "8.final_linear.weight"} if case is DROPPED_BOTH else set()
    same_values = {key for key, value in before.items() if torch.equal(found[key], value.bfloat16())}
    assert same_values == before.keys() - trained
    assert after.masters is not None
    assert after.masters.locations.keys() == added | trained, "the optimizer has no state of frozen parameters"


def test_a_prompt_starts_as_the_vectors_of_a_text(tuning: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Again and again up to its length, whichever rank has the rows."""
    text = "def"
    prompt = {"soft_prompt_tuning": {"num_tokens": 5, "init_string": text}}
    settings = {**tuning, **prompt, "train_iters": 1, "extra_save_iters": [0], "model_parallel_size": 2}
    run(2, tmp_path, **settings, save=str(tmp_path / "save"))
    stored = open_model(tmp_path / "save", iteration=0)
    learned = next(stored.full_tensor(shape) for shape in stored.table if is_adapter_tensor(shape))
    words = tensors(open_model(base))["0.word_embeddings.weight"]
    assert torch.equal(learned, words[list((text * 2).encode()[:5])])


def test_loading_reports_what_is_added(tuning: dict[str, Any], base: Path, tmp_path: Path) -> None:
    saving = {"save": str(tmp_path / "save"), "checkpoint_factor": 100, "train_iters": 1}
    run(1, tmp_path / "tuned", **{**tuning, **UPDATES, **saving})
    for added in (UPDATES, PROMPT):
        with pytest.raises(RankFailedError, match=r"that the checkpoint lacks: .*set finetune: true to start them"):
            run(1, tmp_path / "resumed", **{**tuning, **added, "finetune": False, "override_lr_scheduler": True})
    with pytest.raises(RankFailedError, match=r"that the model lacks: 2\.attention.*or merge it with tools/merge_lora"):
        run(1, tmp_path / "plain", **{**tuning, "load": str(tmp_path / "save")})
    on = {**tuning, **BOTH, "finetune": False, "load": str(tmp_path / "save"), "train_iters": 2}
    on["override_lr_scheduler"] = True
    reported = (
        r"is that of modules_to_save: \[\], and the configuration has \[embedding, head\]; give the modules_to_save"
    )
    with pytest.raises(RankFailedError, match=reported):
        run(1, tmp_path / "both", **on)
    run(1, tmp_path / "both", **on, no_load_optim=True)
    other = {"lora": {"rank": 8, "targets": "all"}}
    with pytest.raises(RankFailedError, match=r"lora_A\.weight has shape \[4, 64\], the model's is \[8, 64\]"):
        run(1, tmp_path / "other", **{**tuning, **other, "load": str(tmp_path / "save")})


def use_rank(rank: int, world_size: int, folder: str, settings: dict[str, Any], cases: dict[str, Keys]) -> None:
    """Writes texts with and without a cache, and bits per byte, for each case."""
    os.chdir(folder)
    inference_run.shutdown = lambda: None
    for name, case in cases.items():
        config = resolve([], {**settings, **case}, Resources(world_size)).config
        generate(config.replace(sample_output_file=f"{name}.cached.jsonl"))
        generate(config.replace(sample_output_file=f"{name}.whole.jsonl", recompute=True))
        measure_text(config)
        if rank == 0:
            Path("bits_per_byte.json").rename(f"{name}.bits.json")


@pytest.mark.parametrize("layout", [{"model_parallel_size": 2}, {"pipe_parallel_size": 2}], ids=["tp2", "pp2"])
def test_texts_and_scores(layout: Keys, tuning: dict[str, Any], tmp_path: Path) -> None:
    """Generation and evaluation put a prompt before every text, once, and say the same on every layout; what is merged
    says what the updates say.
    """
    large = {"optimizer": {"type": "Adam", "params": {"lr": 0.01}}, "min_lr": 0.005, "checkpoint_factor": 100}
    expected = {**BASE, "sample_input_file": "prompts.txt", "maximum_tokens": 10}
    expected |= {"eval_text": "valid.txt", "user_script": "generate.py"}
    cases: dict[str, Keys] = {}
    for name, case in {"updates": {"lora": {**UPDATES["lora"], "dora": True}}, "prompt": PROMPT}.items():
        run(1, tmp_path / name, **{**tuning, **large, **case, "save": str(tmp_path / name / "save")})
        cases[name] = {**case, "load": str(tmp_path / name / "save")}
    merge(tmp_path / "updates" / "save", tmp_path / "merged", model_size=2, pipe_size=0)
    cases["merged"] = {"load": str(tmp_path / "merged")}
    said = []
    for number, settings in enumerate(({}, layout)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "prompts.txt").write_text("def read(\nimport os\nclass Stack:\n", encoding="utf-8")
        (folder / "valid.txt").write_text(Path(__file__).read_text(encoding="utf-8")[:300], encoding="utf-8")
        run_distributed(use_rank, number + 1, str(folder), {**expected, **settings, "log_dir": str(folder)}, cases)
        said.append(read_said(folder, cases))
    assert said[0] == said[1]
    one = said[0]
    assert one["updates"] == one["merged"]
    assert one["updates"] != one["prompt"], "the rate was large enough to matter"


def read_said(folder: Path, cases: dict[str, Keys]) -> dict[str, Any]:
    """The texts and bits per byte of each case; texts are the same with and without a cache."""
    said = {}
    for name in cases:
        cached, full = (
            [json.loads(line)["text"] for line in (folder / f"{name}.{how}.jsonl").read_text().splitlines()]
            for how in ("cached", "whole")
        )
        assert cached == full, name
        bits = json.loads((folder / f"{name}.bits.json").read_text())
        said[name] = (cached, round(bits["bits_per_byte"], 4))
    return said


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS.names)
@pytest.mark.parametrize("layout", ["tensor 2", "pipeline 2"])
def test_every_optimizer_trains_updates(name: str, layout: str, tuning: dict[str, Any], tmp_path: Path) -> None:
    """Pieces of low rank are matrices too, which some optimizers factor or make orthogonal."""
    ranks, keys = OPTIMIZER_LAYOUTS[layout]
    settings = {**tuning, **UPDATES, "optimizer": {"type": name, "params": PARAMS[name]}}
    alone = series(run(1, tmp_path / "alone", **settings), "train/lm_loss")
    many = series(run(ranks, tmp_path / "many", **settings, **keys), "train/lm_loss")
    assert many == pytest.approx(alone, rel=TOLERANCE.get(name, 1e-5))
    assert alone[-1] < alone[0]
