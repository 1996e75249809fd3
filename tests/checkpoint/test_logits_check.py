"""The loaded model is asked what the saved one was asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.format import files, layout, logits_check
from megatron.errors import RunError


@dataclass
class Scorer:
    """Scores by a table, one row a token."""

    table: Tensor

    def logits(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


TABLE = torch.randn(50, 50, generator=torch.Generator().manual_seed(1))


def keep(folder: Path, precision: str = "fp32") -> Path:
    files.write_tensors(
        folder / layout.ANSWERS,
        logits_check.answers(Scorer(TABLE), length=2048, vocabulary=50, precision=precision),
    )
    return folder


def test_the_input_is_short_varied_and_inside_the_vocabulary() -> None:
    tokens = logits_check.answers(Scorer(TABLE), length=2048, vocabulary=50, precision="fp32")["tokens"]
    assert tokens.shape == (1, 32)
    assert int(tokens.min()) >= 0 and int(tokens.max()) < 50
    assert len(set(tokens.flatten().tolist())) == 32
    assert logits_check.answers(Scorer(TABLE), length=5, vocabulary=50, precision="fp32")["tokens"].shape == (1, 5)


@pytest.mark.parametrize(("retained", "loaded", "allowed"), [("fp32", "fp32", 1e-4), ("fp32", "bfloat16", 5e-2)])
def test_differences_are_measured_against_the_looser_precision(
    retained: str, loaded: str, allowed: float, tmp_path: Path
) -> None:
    keep(tmp_path, retained)
    token = int(logits_check.answers(Scorer(TABLE), length=9, vocabulary=50, precision=retained)["tokens"][0, 3])
    largest = float(files.read_tensors(tmp_path / layout.ANSWERS)["logits"].abs().max())
    for factor, fails in ((0.8, False), (1.2, True)):
        changed = TABLE.clone()
        changed[token, 7] += factor * allowed * largest
        if fails:
            with pytest.raises(RunError, match=r"answers\.pt: the loaded model's logits differ .* own settings"):
                logits_check.compare(tmp_path, Scorer(changed), loaded)
        else:
            logits_check.compare(tmp_path, Scorer(changed), loaded)


def test_what_is_no_number_is_no_answer(tmp_path: Path) -> None:
    keep(tmp_path)
    with pytest.raises(RunError, match="differ"):
        logits_check.compare(tmp_path, Scorer(TABLE * float("nan")), "fp32")


def test_rows_that_the_vocabulary_gained_are_left_out(tmp_path: Path) -> None:
    keep(tmp_path)
    logits_check.compare(tmp_path, Scorer(torch.cat((TABLE, torch.full((50, 14), 1e6)), 1)), "fp32")


def test_a_checkpoint_without_answers_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logits_check.compare(tmp_path, Scorer(TABLE), "fp32")
    assert "keeps no logits to compare" in caplog.text
