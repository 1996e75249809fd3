"""What a checkpoint says of the model that its adapters are beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.format import layout
from megatron.checkpoint.load.adapter_base import AdapterBase, base_of_checkpoint, frozen_rows, stored_base, tokens_of
from megatron.checkpoint.load.run_inputs_check import RunInputs

ROWS = 640
Facts = dict[str, Any]


def checkpoint(folder: Path, run: Facts | None, configuration: Facts | None) -> Path:
    """A checkpoint's folder with these files; None: it has none."""
    for name, content in ((layout.RUN, run), (layout.RESOLVED, configuration)):
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content))
    return folder


SIZES: dict[str, tuple[Facts | None, Facts | None, int]] = {
    "nothing is known": (None, None, ROWS),
    "the run's tokenizer": ({"tokenizer": {"vocab_size": 598}}, {}, 598),
    "an import": (None, {"vocab_size": 630}, 630),
    "rows of an import that no token has": ({"tokenizer": {"vocab_size": 598}}, {"vocab_size": 630}, 630),
    "a tokenizer with more tokens than rows": ({"tokenizer": {"vocab_size": 700}}, {"vocab_size": 630}, 630),
    "an unknown tokenizer": ({"tokenizer": None}, {"vocab_size": None}, ROWS),
}


@pytest.mark.parametrize("case", SIZES)
def test_rows_that_are_tokens(case: str, tmp_path: Path) -> None:
    run, configuration, expected = SIZES[case]
    assert tokens_of(checkpoint(tmp_path, run, configuration), ROWS) == expected


LORA: Facts = {"rank": 4, "modules_to_save": ["embedding"]}
BASES: dict[str, tuple[Facts | None, Facts | None, AdapterBase]] = {
    "a whole model": ({"tokenizer": {"vocab_size": 598}}, {"lora": None}, AdapterBase(598)),
    "adapters beside a known base": (
        {"tokenizer": {"vocab_size": 600}, **RunInputs(base=AdapterBase(598, ("head",))).as_json()},
        {"lora": LORA},
        AdapterBase(598, ("head",)),
    ),
    "adapters of an earlier release": ({"tokenizer": {"vocab_size": 600}}, {"lora": {"rank": 4}}, AdapterBase(None)),
    "adapters of an earlier release, tied": (None, {"lora": LORA}, AdapterBase(None, ("embedding", "head"))),
    "adapters, untied": (None, {"lora": LORA, "no_weight_tying": True}, AdapterBase(None, ("embedding",))),
    "a prompt of an earlier release": (None, {"soft_prompt_tuning": {"num_tokens": 4}}, AdapterBase(None)),
}


@pytest.mark.parametrize("case", BASES)
def test_the_base_of_further_adapters(case: str, tmp_path: Path) -> None:
    run, configuration, expected = BASES[case]
    assert base_of_checkpoint(checkpoint(tmp_path, run, configuration), ROWS) == expected


def test_a_base_is_stored_with_what_is_trained_beside_it(tmp_path: Path) -> None:
    base = AdapterBase(598, ("head",)).with_trained(frozenset({"embedding"}))
    assert base.trained == ("embedding", "head")
    assert stored_base(checkpoint(tmp_path, RunInputs(base=base).as_json(), None)) == base
    assert stored_base(checkpoint(tmp_path, RunInputs().as_json(), None)) is None


def test_what_stays_frozen() -> None:
    assert frozen_rows(frozenset(), tied=True) == ["embedding"]
    assert frozen_rows(frozenset(), tied=False) == ["embedding", "output layer"]
    assert frozen_rows(frozenset({"embedding"}), tied=False) == ["output layer"]
    assert frozen_rows(frozenset({"embedding", "head"}), tied=False) == []
