"""A configuration reaches the worker as it left the launcher."""

import json
from pathlib import Path

import pytest

from megatron.config import serialize
from megatron.errors import ConfigError
from tests.config.small import resolved


def test_file_and_text_give_the_same_configuration_back(tmp_path: Path) -> None:
    config = resolved(2, precision="bfloat16", train_data_paths=["a", "b"], comment="naïve").config
    serialize.write(config, tmp_path / "run" / "config.json")
    assert serialize.read(tmp_path / "run" / "config.json") == config
    assert serialize.decode(serialize.encode(config)) == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    assert set("+/ \n") & set(serialize.encode(config)) == set()


def test_what_is_no_configuration_is_a_issue_of_the_reader(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        serialize.read(tmp_path / "absent.json")
    for text in ("", "[1]", "{", "3"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ConfigError, match=r"x\.json: this is not a resolved configuration"):
            serialize.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps({"num_layer": 1}))
    with pytest.raises(ConfigError, match="did you mean num_layers"):
        serialize.read(tmp_path / "x.json")
    for text in ("", "***", "YWJj"):
        with pytest.raises(ConfigError, match="damaged"):
            serialize.decode(text)
