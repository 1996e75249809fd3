"""The file that names the last complete evaluation: which resumes evaluate first, and which do not."""

import json
from pathlib import Path

import pytest

from megatron.errors import RunError
from megatron.training.evaluation_mark import EvaluationMark

FILE = "evaluated.json"


@pytest.mark.parametrize(
    ("stored", "resumes", "loaded", "missing"),
    [
        ('{"iteration": 4}', True, 8, True),
        ('{"iteration": 0}', True, 8, True),  # ended in its first evaluation
        ('{"iteration": 8}', True, 8, False),
        ('{"iteration": 12}', True, 8, False),  # goes back to an earlier checkpoint
        ('{"iteration": 4}', False, 8, False),  # of another run in this folder
        (None, True, 8, False),  # an earlier version has saved
        (None, False, 0, False),
        ("", True, 8, False),
        ("[4]", True, 8, False),
        ('{"iteration": "4"}', True, 8, False),
    ],
)
def test_what_is_missing_at_the_start(
    stored: str | None, resumes: bool, loaded: int, missing: bool, tmp_path: Path
) -> None:
    if stored is not None:
        (tmp_path / FILE).write_text(stored)
    assert EvaluationMark(tmp_path, resumes=resumes, leads=True).start(loaded) is missing
    found = json.loads((tmp_path / FILE).read_text())
    assert found == (json.loads(stored or "") if missing else {"iteration": loaded})
    EvaluationMark(tmp_path, resumes=resumes, leads=True).complete(loaded)
    assert not EvaluationMark(tmp_path, resumes=True, leads=True).start(loaded)


def test_a_rank_that_does_not_lead_writes_nothing(tmp_path: Path) -> None:
    EvaluationMark(tmp_path, resumes=True, leads=False).complete(4)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "save").write_text("a file")
    with pytest.raises(RunError, match=r"writing .*evaluated\.json failed"):
        EvaluationMark(tmp_path / "save", resumes=True, leads=True).complete(4)
