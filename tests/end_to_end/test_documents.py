"""Runs on labels, whole documents and documents kept apart: the same in every layout; a length in passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter
from tests.end_to_end.runs import make_documents, run, series
from tests.layouts import pick

LAYOUTS = pick(
    "pipeline 2, accumulation 4",
    "tensor 2, sequence",
    "context 2",
    "data 2, ZeRO 3, accumulation 2",
    "accumulation 8",
    "recomputed",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "rotary": {"reset_attention_mask": True, "reset_position_ids": True},
    "learned": {
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "eod_mask_loss": True,
        "pos_emb": "learned",
        "no_weight_tying": False,
        "pack_impl": "pack_until_overflow",
    },
    "alibi, sparse": {
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "pos_emb": "alibi",
        "attention_config": [[["local", "bigbird"], "all"]],
        "sparsity_config": {"block": 4},
    },
    "rpe, window": {
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "pos_emb": "rpe",
        "sliding_window_width": 12,
    },
    "sinusoidal, fixed": {
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "pos_emb": "sinusoidal",
        "attention_config": [[["sparse_fixed", "bslongformer"], "all"]],
        "sparsity_config": {"block": 4},
    },
}
HALVES = {"learned": slice(0, None, 2), "sinusoidal, fixed": slice(1, None, 2)}
"""Positions that are looked up by number in both: each setting takes half of the layouts."""


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_documents(tmp_path_factory.mktemp("data"), longest=40)


@pytest.mark.parametrize("settings", SETTINGS)
def test_layouts_agree(settings: str, short_documents: tuple[str, str], tmp_path: Path) -> None:
    tokens, labels = short_documents
    common = {
        "train_iters": 4,
        "eval_interval": 2,
        "eval_iters": 1,
        "train_data_paths": [tokens],
        "train_label_data_paths": [labels],
        "valid_data_paths": [tokens],
        **SETTINGS[settings],
    }
    expected = run(1, tmp_path / "single", **common)
    for name in list(LAYOUTS)[HALVES[settings]] if settings in HALVES else LAYOUTS:
        world_size, layout = LAYOUTS[name]
        records = run(world_size, tmp_path / name, **common, **layout)
        for metric in ("train/lm_loss", "validation/lm_loss"):
            assert series(records, metric) == pytest.approx(series(expected, metric), rel=1e-5), (name, metric)
        norms = series(expected, "train/grad_norm")
        assert series(records, "train/grad_norm") == pytest.approx(norms, rel=1e-4), name
    plain = run(1, tmp_path / "plain", **{**common, "reset_attention_mask": False, "reset_position_ids": False})
    assert series(plain, "train/lm_loss")[1:] != pytest.approx(series(expected, "train/lm_loss")[1:], rel=1e-4)


def test_an_evaluation_without_a_label_reports_no_loss(short_documents: tuple[str, str], tmp_path: Path) -> None:
    """It is no loss of 0, the best that there can be."""
    tokens, labels = short_documents
    source = IndexedDataset(tokens)
    with DatasetWriter(tmp_path / "none", numpy.dtype("<i4")) as writer:
        for document in range(len(source)):
            writer.add_document(numpy.full(len(source[document]), -100))
    data = {"train_data_paths": [tokens], "train_label_data_paths": [labels], "valid_data_paths": [tokens]}
    none = {**data, "valid_label_data_paths": [str(tmp_path / "none")]}
    for name, paths, count in (("some", {**data, "valid_label_data_paths": [labels]}, 2), ("none", none, 0)):
        records = run(1, tmp_path / name, train_iters=4, eval_interval=2, eval_iters=1, **paths)
        assert len(series(records, "validation/lm_loss")) == count
        assert len(series(records, "train/lm_loss")) == 4


def test_passes_become_steps(short_documents: tuple[str, str], tmp_path: Path) -> None:
    """300 documents twice, 8 at a time; the learning rate decays to its floor at the last step."""
    source = IndexedDataset(short_documents[0])
    with DatasetWriter(tmp_path / "few", numpy.dtype("<i4")) as writer:
        for document in range(300):
            writer.add_document(source[document])
    records = run(
        1,
        tmp_path,
        train_iters=None,
        train_epochs=2,
        train_data_paths=[str(tmp_path / "few")],
        pack_impl="unpacked",
        num_layers=1,
        eval_iters=0,
        log_interval=5,
    )
    assert records[-1]["iteration"] == 75
    assert records[-1]["train/learning_rate"] == pytest.approx(1e-4)
