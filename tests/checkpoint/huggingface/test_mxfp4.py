"""Experts in MXFP4, as the public GPT-OSS folders have them, are read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.huggingface.mxfp4 import unpack
from tests.checkpoint.huggingface.models import save
from tests.checkpoint.huggingface.test_expert_families import dims_of, settings_of

STACK = "gate_up_proj"
"""Its inputs divide by the 32 of a block."""


def packed(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte, and exponents from the smallest to one whose numbers bfloat16 just holds."""
    draws = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draws)
    return blocks, torch.randint(0, 250, shape, dtype=torch.uint8, generator=draws)


def test_numbers_are_those_of_transformers() -> None:
    blocks, scales = packed((2, 8, 3), 1)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    found = unpack(blocks, scales)
    assert found.shape == expected.shape == (2, 96, 8)
    assert torch.equal(found, expected)


def test_a_number_is_sign_exponent_and_mantissa_times_a_power_of_two() -> None:
    blocks = torch.tensor([[[[0x71] + [0x80] * 15]]], dtype=torch.uint8)  # 0.5 and 6, then 0 and -0
    found = unpack(blocks, torch.tensor([[[128]]], dtype=torch.uint8))
    assert found.flatten()[:4].tolist() == [1.0, 12.0, 0.0, -0.0]


def test_a_packed_folder_is_read_as_the_unpacked_one(tmp_path: Path) -> None:
    save("gpt_oss", tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    packed_weights = dict(weights)
    for number, name in enumerate(name for name in weights if name.endswith(STACK)):
        count, inputs, outputs = packed_weights.pop(name).shape
        blocks, scales = packed((count, outputs, inputs // 32), number)
        scales = scales % 8 + 120
        packed_weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weights[name] = unpack(blocks, scales).contiguous()
    save_file(weights, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    folder, settings = settings_of("gpt_oss", tmp_path / "packed")
    save_file(packed_weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    dims = dims_of(settings)
    found, expected = (Folder.open(tmp_path / name).weights(dims) for name in ("packed", "plain"))
    assert sum(name.endswith("_blocks") for name in packed_weights) == 4
    assert found.keys() == expected.keys()
    for key in sorted(expected.keys()):
        assert torch.equal(found.shards(key)[0], expected.shards(key)[0]), key
