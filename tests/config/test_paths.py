"""Paths in configurations: the home folder is found, and nothing is taken for a folder called ~ or ${HOME}."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from megatron.config import FIELDS
from megatron.config.paths import PATH_KEYS
from tests.config.small import errors, resolved

NAMES = re.compile(r"(^|_)(save|load|path|paths|file|dir|text|cloze|data|pretrained_checkpoint|embedder)$|hostfile")
LISTS = ("_data_paths", "_data")
"""Ends of the names of keys with several paths."""
NO_PATHS = {"s3_path"}  # an address


def test_every_key_that_names_files_is_known() -> None:
    named = {name for name, field in FIELDS.items() if NAMES.search(name) and "str" in str(field.annotation)}
    named |= {name for name in FIELDS if name.endswith("_data_paths")}
    assert named - NO_PATHS == PATH_KEYS


@pytest.mark.parametrize("key", sorted(PATH_KEYS - {"hostfile", "base_shapes_file", "pretrained_checkpoint"}))
def test_the_home_folder_is_written_out(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    given = ["~/a", "b~/c"] if key.endswith(LISTS) else "~/a"
    sets = [f"{split}_data_paths" for split in ("train", "valid", "test")] if key.endswith("_data_paths") else []
    changes: dict[str, Any] = {name: ["x", "y"] for name in sets}
    changes |= {"checkpoint_factor": 10, "tokenizer_type": "HFTokenizer", key: given}
    value = resolved(**changes).config.flat()[key]
    assert value == (("/users/me/a", "b~/c") if key.endswith(LISTS) else "/users/me/a")


@pytest.mark.parametrize("value", ["$HOME/x", "a/${RUN}/b"])
@pytest.mark.parametrize("key", ["save", "data_path", "vocab_file", "hostfile"])
def test_variables_are_refused(key: str, value: str) -> None:
    (line,) = [line for line in errors(**{key: value}) if "variables of the shell" in line]
    assert line.startswith(f"command line: {key} = '{value}'")


@pytest.mark.parametrize("key", ["save", "data_path", "vocab_file", "hostfile"])
def test_the_home_folder_of_nobody_is_no_folder_here(key: str) -> None:
    (line,) = [line for line in errors(**{key: "~no-such-user/x"}) if "home folder" in line]
    assert line == (
        f"command line: {key} = '~no-such-user/x': there is no home folder for ~no-such-user; write the path out; "
        "a folder of that name is ./~no-such-user"
    )
    assert not any("home folder" in line for line in errors(**{key: "./~no-such-user/x"}))


def test_one_path_of_several_is_named() -> None:
    (line,) = [line for line in errors(train_data_paths=["a", "$B/c"]) if "variables of the shell" in line]
    assert "train_data_paths = '$B/c'" in line


def test_an_empty_path_is_no_folder() -> None:
    assert any("save = '': this is no path; leave the key out" in line for line in errors(save="", checkpoint_factor=1))


def test_a_dollar_that_starts_no_variable_is_part_of_a_name() -> None:
    assert resolved(data_path="a$/b").config.data.data_path == "a$/b"
    assert os.path.expanduser("~") != "~"
