"""The tool that makes experts of a dense checkpoint: the same logits at first, and a model that trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.format import files, layout
from megatron.checkpoint.load.stored_model import open_model
from megatron.config import serialize
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from tests.end_to_end.runs import make_dataset, run, series
from tools import upcycle

MODEL = {"num_layers": 3, "use_bias_in_mlp": True, "train_iters": 2, "eval_iters": 0, "checkpoint_factor": 2}
EXPERTS = {
    "softmax": ["moe_num_experts=4", "moe_top_k=2", "moe_layer_freq=[1, 0, 1]"],
    "sigmoid, groups, bias, shared": [
        *("moe_num_experts=8", "moe_top_k=3", "moe_router_score_function=sigmoid", "moe_router_num_groups=4"),
        *("moe_router_group_topk=2", "moe_router_enable_expert_bias=true", "moe_first_k_dense_replace=1"),
        *("moe_shared_expert_intermediate_size=24", "moe_shared_expert_gate=true"),
    ],
    "late softmax": ["moe_num_experts=4", "moe_top_k=2", "moe_router_pre_softmax=false", "moe_normalize_top_k=false"],
}
BIASES = "moe_use_bias_in_experts=true"


@pytest.fixture(scope="module", params=["swiglu", "gelu"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save folder of two training steps, so that biases are not 0."""
    folder = tmp_path_factory.mktemp(request.param)
    run(1, folder, **MODEL, data_path=make_dataset(folder), activation=request.param, save=str(folder / "save"))
    return folder / "save"


def logits(save: Path) -> Tensor:
    step = layout.step_directory(save, 2)
    config = serialize.from_json((step / layout.RESOLVED).read_text(), "here").replace(load=str(save), iteration=None)
    engine = build_inference_engine(config.for_inference(), Topology.single(), open_model(save).rows)
    return engine.logits(torch.arange(60).view(2, 30) % 97).double()


@pytest.mark.parametrize("name", EXPERTS)
def test_the_logits_are_those_of_the_dense_model(name: str, dense: Path, tmp_path: Path) -> None:
    arguments = [f"--load-dir={dense}", f"--save-dir={tmp_path}", "--target-tensor-parallel-size=2"]
    assert upcycle.main([*arguments, *EXPERTS[name], BIASES]) == 0
    made = open_model(tmp_path)
    routers = [made.full_tensor(shape) for shape in made.table if shape.name == "mlp.router.layer.weight"]
    assert len(routers) == (3 if name == "late softmax" else 2)
    assert all(0.01 < router.std() < 0.03 for router in routers)
    expected, found = logits(dense), logits(tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())))


def test_a_run_begins_with_it(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a balancing bias too, which the checkpoint has not, and which begins at 0."""
    arguments = [f"--load-dir={dense}", f"--save-dir={tmp_path / 'made'}", *EXPERTS["softmax"]]
    assert upcycle.main([*arguments, BIASES]) == 0
    assert "the model with experts" in capsys.readouterr().out
    config = files.read_json(dense.parent / "save" / "global_step2" / layout.RESOLVED)
    settings = {**MODEL, "activation": config["activation"], "data_path": str(dense.parent / "text")}
    settings |= {"moe_num_experts": 4, "moe_top_k": 2, "moe_layer_freq": [1, 0, 1], "moe_router_type": "topk"}
    settings |= {"moe_normalize_top_k": True, "moe_use_bias_in_experts": True}
    settings |= {"moe_router_enable_expert_bias": True, "save": str(tmp_path / "tuned")}
    begun = run(1, tmp_path, **settings, load=str(tmp_path / "made"), finetune=True)
    tuned = open_model(tmp_path / "tuned")
    biases = [tuned.full_tensor(shape) for shape in tuned.table if shape.kind == "buffer"]
    assert len(biases) == 2
    assert all(0 < bias.abs().max() <= 2.1e-3 for bias in biases)
    losses = series(begun, "train/lm_loss")
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["moe_num_experts=4"], "moe_top_k"),
        (["moe_num_experts=4", "moe_top_k=2"], "the MLPs have biases, which would be lost"),
        (["moe_num_experts=4", "moe_top_k=2", "moe_normalize_top_k=false", BIASES], "would not sum to 1"),
        (["moe_num_experts=4", "moe_top_k=2", "moe_ffn_hidden_size=8", BIASES], "experts begin as the plain MLP"),
        (["num_layers=4"], "num_layers: this is no key of experts"),
        (["moe_num_experts=1", BIASES], "a model with experts has at least 2"),
    ],
)
def test_what_would_be_another_model_is_refused(
    keys: list[str], expected: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upcycle.main([f"--load-dir={dense}", f"--save-dir={tmp_path}", *keys]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
