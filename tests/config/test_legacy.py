"""Keys of other releases and programs: an answer names a key that exists and means the same, and shows what works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config.config import FIELDS
from megatron.config.renamed_keys import IGNORED, REFUSED, RENAMED, apply_renames
from megatron.config.yaml_loader import SourcedValue
from tests.config.small import resolved

PAGE = Path(__file__).parents[2] / "docs" / "differences.md"
UNITS = {
    "steps": ("_steps", "_iters", "_interval"),
    "fraction": ("_ratio", "_fraction", "_percent", "_pct"),
    "samples": ("batch_size", "batch_size_per_gpu"),
    "epochs": ("_epochs",),
    "tokens": ("_seq_length", "_seq_len", "_max_length"),
    "heads": ("_groups", "_heads"),
    "features": ("_dim", "_hidden_size"),
    "blocks": ("_layers",),
}
"""What a key counts, by how names of keys end."""


def answers(text: str) -> list[str]:
    """The keys that an answer says to write."""
    return re.findall(r"(?:write|give|with) (?!the\b)(\w+)", text)


def examples(text: str) -> dict[str, Any]:
    """What an answer writes out: `key: value`, with a value that is no ellipsis."""
    found = re.findall(r"(\w+): (\[\[.*?\]\]\]|\{.*\}|\w+)", text)
    return {name: yaml.safe_load(value) for name, value in found if name in FIELDS and "..." not in value}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_answer_names_keys_that_exist(name: str) -> None:
    named = answers(REFUSED[name])
    assert named
    assert [key for key in named if key not in FIELDS] == []
    assert name not in FIELDS and name not in RENAMED and name not in IGNORED
    _, issues, _ = apply_renames({name: SourcedValue(1, "a.yml:1")})
    assert [issue.hint for issue in issues] == [REFUSED[name]]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_answer_counts_what_the_old_key_counted(name: str) -> None:
    key = answers(REFUSED[name])[0]
    units = {unit for unit, ends in UNITS.items() if name.endswith(ends)}
    assert not units or FIELDS[key].unit in units
    if name.endswith("_samples"):
        assert FIELDS[key].unit in ("samples", "fraction") and "lr_decay_samples" in REFUSED[name]


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED.items()))
def test_a_renamed_key_exists(old: str, new: str) -> None:
    assert new in FIELDS and old not in FIELDS


def test_warmups_of_other_programs_are_answered_by_what_they_count() -> None:
    named = {name: answers(text)[0] for name, text in REFUSED.items() if "warmup" in name}
    assert named == {
        "lr_warmup_fraction": "warmup",
        "lr_warmup_iters": "warmup_iters",
        "lr_warmup_samples": "warmup",
        "warmup_ratio": "warmup",
        "warmup_steps": "warmup_iters",
    }


def test_recomputation_of_megatron_is_the_selective_one() -> None:
    assert examples(REFUSED["recompute_activations"]) == {"recompute_granularity": "selective"}


@pytest.mark.parametrize("name", sorted(name for name, text in REFUSED.items() if examples(text)))
def test_what_an_answer_writes_out_is_accepted(name: str) -> None:
    shown = examples(REFUSED[name])
    found = resolved(**shown).config
    assert found.flat().keys() >= shown.keys()


def test_the_page_of_differences_lists_keys_that_are_refused() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if "refused by name, with today's spelling" in line]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert names
    assert [name for name in names if name not in REFUSED] == []
