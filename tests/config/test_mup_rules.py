"""What muP refuses, in one line each, and what a base file must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError
from megatron.plan.base_shapes import check_base_shapes, write_base_shapes
from megatron.registry import OPTIMIZERS
from tests.config.small import errors, resolved

KNOWN = {"adam", "cpu_adam", "cpu_torch_adam", "onebitadam", "lion", "sgd"}


@pytest.fixture
def base(tmp_path: Path) -> str:
    """The base file of SMALL."""
    path = str(tmp_path / "base.json")
    write_base_shapes(resolved(save_base_shapes=True, base_shapes_file=path).config)
    return path


OFF: list[tuple[dict[str, Any], str]] = [
    ({"use_mup": True}, "use_mup = True: there is no base model to compare with; give base_shapes_file, which"),
    ({"save_base_shapes": True}, "save_base_shapes = True: there is no file to write; give base_shapes_file"),
    ({"base_shapes_file": "a"}, "base_shapes_file = 'a': it is neither read nor written; set use_mup to read it"),
    ({"coord_check": True}, "coord_check = True: it checks muP, which is off; set use_mup"),
    ({"mup_attn_temp": 2.0}, "mup_attn_temp = 2.0: it is a factor of muP, which is off; set use_mup, or leave it out"),
    ({"mup_base_widths": {}}, "mup_base_widths = {}: it follows from base_shapes_file; leave it out"),
    (
        {"use_mup": True, "base_shapes_file": "nowhere.json"},
        "base_shapes_file = 'nowhere.json': the file cannot be read (No such file or directory); write it with",
    ),
]


@pytest.mark.parametrize(("changes", "reported"), OFF, ids=str)
def test_without_a_base_or_without_mup(changes: dict[str, Any], reported: str) -> None:
    (line,) = errors(**changes)
    assert reported in line


ON: list[tuple[dict[str, Any], str]] = [
    ({"mup_output_temp": 0.0}, "mup_output_temp = 0.0: it must be more than 0"),
    ({"mup_width_scale": 1}, "mup_width_scale = 1: each width is that many times the one before: at least 2"),
    ({"mup_rp_embedding_mult": 2.0}, "mup_rp_embedding_mult = 2.0: pos_emb = learned learns no relative positions"),
    ({"norm": "scalenorm"}, "norm = 'scalenorm': muP has no rule for its one length"),
    ({"attention_config": ["global", "mamba"]}, "muP has no rules for blocks of kind mamba"),
    ({"attention_config": ["gmlp", "rwkv"]}, "muP has no rules for blocks of kind gmlp, rwkv"),
    (
        {"coord_check": True, "pipe_parallel_size": 1},
        "coord_check = True: the check needs models on one stage; add --pi",
    ),
    ({"coord_check": True, "user_script": "generate.py"}, "coord_check = True: generate.py does not do it; call"),
    ({"coord_check": True, "save_base_shapes": True}, "coord_check = True: save_base_shapes is set as well; one after"),
    ({"mup_base_widths": {"hidden_size": 1}}, "this follows from base_shapes_file, which makes it {'hidden_size': 64"),
]


@pytest.mark.parametrize(("changes", "reported"), ON, ids=str)
def test_with_mup(changes: dict[str, Any], reported: str, base: str) -> None:
    lines = errors(use_mup=True, base_shapes_file=base, **changes)
    assert [line for line in lines if reported in line], lines


@pytest.mark.parametrize("kind", OPTIMIZERS.names)
def test_optimizers_with_a_rule_are_taken(kind: str, base: str) -> None:
    lines = errors(use_mup=True, base_shapes_file=base, optimizer={"type": kind, "params": {"lr": 0.001}})
    refused = [line for line in lines if "muP has rules for steps" in line]
    assert not refused if kind in KNOWN else refused


def test_text_is_written_whatever_the_optimizer(base: str) -> None:
    muon = {"type": "muon", "params": {"lr": 0.001}}
    assert errors(use_mup=True, base_shapes_file=base, optimizer=muon, user_script="generate.py") == []


def test_a_scale_that_nothing_reads_is_reported(base: str) -> None:
    warnings = resolved(use_mup=True, base_shapes_file=base, mup_width_scale=4).warnings
    assert [line for line in warnings if "mup_width_scale = 4: has no effect; only coord_check reads it" in line]
    assert not resolved(use_mup=True, base_shapes_file=base, mup_width_scale=4, coord_check=True).warnings


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("", "it is not JSON"),
        ("[1, 2]", "its format is not 'neox base shapes 1'"),
        ("0.word_embeddings.weight: [null, 64]", "it is not JSON"),
        ('{"format": "neox base shapes 1", "widths": {"hidden_size": 0}, "tensors": {}}', "it is damaged"),
    ],
)
def test_files_of_another_kind(text: str, reported: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text(text, encoding="utf-8")
    (line,) = errors(use_mup=True, base_shapes_file=str(tmp_path / "other"))
    assert reported in line


OTHER: list[tuple[dict[str, Any], str]] = [
    ({"num_layers": 3}, "it lacks 4.input_layernorm.weight"),
    ({"norm": "rmsnorm"}, "it alone has 2.input_layernorm.weight"),
    ({"no_weight_tying": True}, "it lacks 6.final_linear.weight"),
    ({"moe_num_experts": 4}, "it lacks 2.mlp.router.layer.weight"),
]


@pytest.mark.parametrize(("changes", "reported"), OTHER, ids=str)
def test_a_base_of_another_architecture_is_refused(changes: dict[str, Any], reported: str, base: str) -> None:
    config = resolved(use_mup=True, base_shapes_file=base, **changes).config
    with pytest.raises(ConfigError, match=f"it is the base of another architecture: .*{reported}"):
        check_base_shapes(config)


def test_widths_may_differ(base: str) -> None:
    """Heads, their width, key heads, the MLP and the vocabulary; all of them are seen in the base widths."""
    wide = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 300, "vocab_size": 1000}
    config = resolved(use_mup=True, base_shapes_file=base, kv_channels=48, **wide).config
    check_base_shapes(config)
    widths = {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_width": 256}
    assert config.mup.mup_base_widths == widths


def test_a_changed_file_is_noticed(base: str) -> None:
    content = json.loads(Path(base).read_text(encoding="utf-8"))
    content["widths"]["mlp_width"] = 128
    Path(base).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"it has another shape of 2\.mlp\.linear1\.weight"):
        check_base_shapes(resolved(use_mup=True, base_shapes_file=base).config)
