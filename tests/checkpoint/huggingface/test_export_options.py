"""What an export writes for other programs, and by wish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron.checkpoint.huggingface.export_model import ExportOptions, export
from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.stored_model import open_model
from tests.checkpoint.huggingface.models import make, save, tokens


def test_what_other_programs_ask_for_is_written(tmp_path: Path) -> None:
    """n_ctx, the authors' name of MPT's class, and Mamba's width always; biases and a head of its own by wish."""
    reported = {
        "gpt2": ("n_ctx", 64),
        "mpt": ("architectures", ["MPTForCausalLM"]),
        "mamba": ("intermediate_size", 128),
    }
    for name, (key, value) in reported.items():
        save(name, tmp_path / name)
        adopt(Folder.open(tmp_path / name), tmp_path / f"{name}-ours")
        export(open_model(tmp_path / f"{name}-ours"), tmp_path / f"{name}-back")
        assert json.loads((tmp_path / f"{name}-back" / "config.json").read_text())[key] == value
        with torch.no_grad():
            back = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-back").eval()(tokens()).logits
        torch.testing.assert_close(back, make(name)(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "added"),
    [
        ("neox without attention biases", ExportOptions(zero_biases=True), "attention.dense.bias"),
        ("neox, one residual, tied", ExportOptions(own_head=True), "embed_out.weight"),
        ("llama, wide heads, tied", ExportOptions(own_head=True), "lm_head.weight"),
    ],
)
def test_requests_add_tensors_and_change_nothing(name: str, options: ExportOptions, added: str, tmp_path: Path) -> None:
    save(name, tmp_path / "theirs")
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    export(open_model(tmp_path / "ours"), tmp_path / "plain")
    export(open_model(tmp_path / "ours"), tmp_path / "more", options=options)
    plain, more = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "more"))
    assert any(key.endswith(added) for key in more.keys() - plain.keys())
    with torch.no_grad():
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "more").eval()(tokens()).logits
        expected = make(name)(tokens()).logits
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-5)
