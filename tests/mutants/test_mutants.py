"""Every mutant fits the code as it is; tests/mutants/run.py applies them."""

from __future__ import annotations

import pytest

from tests.architecture.source import ROOT
from tests.mutants.mutants import MUTANTS, Mutant
from tests.mutants.run import changed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_fits_the_code(mutant: Mutant) -> None:
    text = (ROOT / "megatron" / mutant.path).read_text(encoding="utf-8")
    compile(changed(mutant, text), mutant.path, "exec")
    assert mutant.new != mutant.old
    for test in mutant.tests:
        assert (ROOT / "tests" / test).is_file(), test


def test_there_are_forty() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40


def test_an_outdated_mutant_is_an_error() -> None:
    with pytest.raises(ValueError, match="bring the mutant up to date"):
        changed(MUTANTS[0], "x = 1\n")
