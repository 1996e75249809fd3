"""The tools that take low-rank updates and soft prompts out of a checkpoint, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron.checkpoint.format import layout
from megatron.checkpoint.load.stored_model import open_model
from megatron.param_table import is_adapter_tensor
from tests.end_to_end.runs import make_dataset, run
from tools import convert_to_hf, inspect_checkpoint, merge_lora, reshape_checkpoint

UPDATES: dict[str, Any] = {"lora": {"rank": 2, "alpha": 6, "targets": ["query_key_value", "dense_4h_to_h"]}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save folders of two steps in bfloat16: with updates on two ranks, with a prompt, and of a whole model."""
    folder = tmp_path_factory.mktemp("saved")
    settings = {"data_path": make_dataset(folder), "train_iters": 2, "eval_iters": 0, "checkpoint_factor": 2}
    settings |= {"precision": "bfloat16", "num_layers": 2, "zero_optimization": {"stage": 1}}
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "updates": (2, {**UPDATES, "model_parallel_size": 2}),
        "prompt": (1, {"soft_prompt_tuning": {"num_tokens": 3}}),
        "whole": (1, {}),
    }
    for name, (ranks, keys) in cases.items():
        run(ranks, folder / name, **settings, **keys, save=str(folder / name / "save"))
    return {name: folder / name / "save" for name in cases}


def test_merging(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """W + 3 B A of fp32 products, rounded once; other tensors as they are; any layout; no state of the optimizer."""
    arguments = [f"--load-dir={saved['updates']}", f"--save-dir={tmp_path / 'merged'}"]
    assert merge_lora.main([*arguments, "--target_tensor_parallel_size=2", "--target-pipeline-parallel-size=2"]) == 0
    assert "the model with its adapters merged" in capsys.readouterr().out
    before, after = open_model(saved["updates"]), open_model(tmp_path / "merged")
    assert after.model.lora is None
    assert after.masters is None
    tensors = {f"{shape.layer}.{shape.name}": before.full_tensor(shape) for shape in before.table}
    for shape in after.table:
        key = f"{shape.layer}.{shape.name}"
        module = key.removesuffix(".weight")
        expected = tensors[key]
        if f"{module}.lora_A.weight" in tensors:
            up, down = tensors[f"{module}.lora_B.weight"].double(), tensors[f"{module}.lora_A.weight"].double()
            exact = expected.double() + 3 * up @ down
            assert not torch.equal(exact, expected.double()), "there is an update"
            torch.testing.assert_close(after.full_tensor(shape).double(), exact, rtol=2**-8, atol=1e-6)
            expected = exact.bfloat16()
        torch.testing.assert_close(after.full_tensor(shape), expected, rtol=2**-8, atol=0)
    assert inspect_checkpoint.main([str(tmp_path / "merged")]) == 0
    assert merge_lora.main(arguments) == 1
    assert "the checkpoint is there already" in capsys.readouterr().err


def test_what_cannot_be_merged(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, reported in {"whole": "has no low-rank updates", "prompt": "no part of any matrix"}.items():
        assert merge_lora.main([f"--load-dir={saved[name]}", f"--save-dir={tmp_path / name}"]) == 2
        assert reported in capsys.readouterr().err
        assert layout.iterations(tmp_path / name) == []
    uneven = [f"--load-dir={saved['updates']}", f"--save-dir={tmp_path / 'uneven'}"]
    assert merge_lora.main([*uneven, "--target-tensor-parallel-size=3"]) == 2
    assert "target_tensor_parallel_size = 3" in capsys.readouterr().err


def test_a_full_export_has_the_updates_in_it(saved: dict[str, Path], tmp_path: Path) -> None:
    """From the optimizer's fp32 copies where fp32 is wanted."""
    assert merge_lora.main([f"--load-dir={saved['updates']}", f"--save-dir={tmp_path / 'merged'}"]) == 0
    for name, load in (("one", saved["updates"]), ("two", tmp_path / "merged")):
        assert (
            convert_to_hf.main([f"--input-dir={load}", f"--output-dir={tmp_path / name}", "--no-save-tokenizer"]) == 0
        )
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    wide = [f"--input-dir={saved['updates']}", f"--output-dir={tmp_path / 'wide'}", "--precision=fp32"]
    assert convert_to_hf.main([*wide, "--no-save-tokenizer"]) == 0
    precise = load_file(tmp_path / "wide" / "model.safetensors")
    stored = open_model(saved["updates"])
    shapes = {f"{shape.layer}.{shape.name}": shape for shape in stored.table}
    down, up = (stored.full_tensor(shapes[f"2.mlp.linear2.lora_{one}.weight"], precise=True) for one in "AB")
    expected = stored.full_tensor(shapes["2.mlp.linear2.weight"]).float() + 3 * up @ down
    torch.testing.assert_close(precise["model.layers.0.mlp.down_proj.weight"], expected)


def test_an_adapter_alone(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = ["--adapter-only", "--base-model", "my/base"]
    for name, kind, count in (("updates", "LORA", 2 * 2 * 4), ("prompt", "PROMPT_TUNING", 1)):
        assert convert_to_hf.main([f"--input-dir={saved[name]}", f"--output-dir={tmp_path / name}", *alone]) == 0
        assert f"{kind}, {count} tensors" in capsys.readouterr().out
        reported = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert reported["peft_type"] == kind
        assert reported["base_model_name_or_path"] == "my/base"
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    assert convert_to_hf.main([f"--input-dir={saved['whole']}", f"--output-dir={tmp_path / 'none'}", *alone]) == 2
    assert "nothing was trained beside a frozen model here" in capsys.readouterr().err
    assert convert_to_hf.main([f"--input-dir={saved['prompt']}", f"--output-dir={tmp_path / 'plain'}"]) == 2
    assert "cannot be merged into the model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["updates", "prompt"])
def test_another_layout_keeps_what_was_added(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    arguments = [f"--load-dir={saved[name]}", f"--save-dir={tmp_path / 'cut'}"]
    sizes = ["--target-tensor-parallel-size=2", "--target-pipeline-parallel-size=2"]
    assert reshape_checkpoint.main([*arguments, *sizes]) == 0
    assert inspect_checkpoint.main(["--compare", str(saved[name]), str(tmp_path / "cut")]) == 0
    assert any(is_adapter_tensor(shape) for shape in open_model(tmp_path / "cut").table)
