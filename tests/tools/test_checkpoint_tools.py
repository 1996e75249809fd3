"""The tools that convert, cut and look into checkpoints, as a user calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.checkpoint.format import files, layout
from tests.checkpoint.huggingface.models import save
from tools import convert_from_hf, convert_to_hf, inspect_checkpoint, reshape_checkpoint


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A LLaMA model of transformers as a checkpoint of ours."""
    save("llama, grouped, biases", tmp_path / "theirs")
    assert convert_from_hf.main(["--input-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "ours")]) == 0
    return tmp_path / "ours"


def test_there_and_back_on_the_command_line(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "num_kv_heads: 2" in (ours / "model.yml").read_text()
    assert convert_to_hf.main(["--input_dir", str(ours), "--output_dir", str(tmp_path / "back")]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("theirs", "back"))
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())
    assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", str(tmp_path / "back")]) == 1
    assert "already holds files of a model" in capsys.readouterr().err


def test_half_precision_is_written_on_request(ours: Path, tmp_path: Path) -> None:
    assert convert_to_hf.main([f"--input-dir={ours}", f"--output-dir={tmp_path / 'half'}", "--precision=bf16"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_cannot_be_expressed_is_reported(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input-dir", str(ours), "--output-dir", str(tmp_path / "gpt2"), "--architecture", "gpt2"]
    assert convert_to_hf.main(arguments) == 2
    assert "norm = 'rmsnorm': a GPT-2 model has 'layernorm'" in capsys.readouterr().err
    assert convert_from_hf.main(["--input-dir", str(ours), "--output-dir", str(tmp_path / "other")]) == 2
    assert "holds no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(("tensor", "pipe"), [(2, 0), (2, 2), (1, 2)])
def test_another_layout_is_the_same_model(ours: Path, tmp_path: Path, tensor: int, pipe: int) -> None:
    cut = tmp_path / "cut"
    arguments = ["--load-dir", str(ours), "--save-dir", str(cut)]
    sizes = [f"--target-tensor-parallel-size={tensor}", f"--target-pipeline-parallel-size={pipe}"]
    assert reshape_checkpoint.main([*arguments, *sizes]) == 0
    names = {path.name for path in (cut / "global_step0").glob("*.pt")}
    assert (layout.layer_file(2, tensor - 1) in names) == (pipe > 0)
    assert len([name for name in names if name.startswith("mp_rank")]) == tensor * max(1, pipe)
    assert inspect_checkpoint.main(["--compare", str(ours), str(cut)]) == 0
    assert reshape_checkpoint.main([*arguments, *sizes]) == 1


def test_uneven_cuts_are_refused(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--load-dir", str(ours), "--save-dir", str(tmp_path / "cut"), "--target-tensor-parallel-size", "5"]
    assert reshape_checkpoint.main(arguments) == 2
    assert "target_tensor_parallel_size = 5" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["convert", "reshape"])
def test_a_newer_empty_step_is_named_beside_the_others(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: str
) -> None:
    (ours / "global_step60").mkdir()
    output = str(tmp_path / "made")
    run = {
        "convert": lambda: convert_to_hf.main(["--input-dir", str(ours), "--output-dir", output]),
        "reshape": lambda: reshape_checkpoint.main(["--load-dir", str(ours), "--save-dir", output]),
    }[tool]
    assert run() == 0  # `latest` decides
    (ours / "latest").unlink()
    output = str(tmp_path / "made again")
    assert run() == 1
    assert "global_step60: no weight files; choose one with --iteration: 0" in capsys.readouterr().err


def test_a_look_inside(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_checkpoint.main([str(ours), "--norms"]) == 0
    said = capsys.readouterr().out
    assert "intact: every file is as it was written" in said
    weights = ours / "global_step0" / layout.model_file(0)
    assert f"{layout.model_file(0)} {weights.stat().st_size:,} bytes" in " ".join(said.split())
    line = next(line for line in said.splitlines() if line.startswith("2.mlp.linear1.weight"))
    module = files.read_tensors(ours / "global_step0" / layout.model_file(0))["module"]
    assert float(line.split()[-1]) == pytest.approx(float(module["sequential.2.mlp.linear1.weight"].norm()), rel=1e-5)
    assert "[256, 64]" in line
    weights.write_bytes(weights.read_bytes()[:-1])
    assert inspect_checkpoint.main([str(ours)]) == 1
    assert "damaged:" in capsys.readouterr().out


def test_differences_are_reported_by_name(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files of another program have no manifest; a configuration describes the model."""
    other = tmp_path / "other" / "global_step0"
    other.mkdir(parents=True)
    content = files.read_tensors(ours / "global_step0" / layout.model_file(0))
    changed = content["module"]["sequential.5.norm.scale"].clone()
    changed[3] += 0.5
    content["module"]["sequential.5.norm.scale"] = changed
    torch.save(content, other / layout.model_file(0))
    config = tmp_path / "whole.yml"
    config.write_text((ours / "model.yml").read_text() + "seq_length: 64\n")
    arguments = ["--compare", str(ours), str(other.parent), "--config-file", str(config)]
    assert inspect_checkpoint.main(arguments) == 1
    assert "5.norm.scale: 0.5 apart at most" in capsys.readouterr().out
    assert inspect_checkpoint.main([*arguments, "--tolerance", "0.6"]) == 0
