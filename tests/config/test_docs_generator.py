"""The generated pages are those that the sections make."""

import json
from pathlib import Path

import pytest
import yaml

from megatron.config import FIELDS
from megatron.config.docs_generator import key_table, schema, schema_text

CONFIGS = Path(__file__).parents[2] / "configs"
STALE = "run `python -m megatron.config.docs_generator`"


def test_the_key_reference_is_fresh() -> None:
    assert (CONFIGS / "README.md").read_text(encoding="utf-8") == key_table(), STALE


def test_the_schema_is_fresh() -> None:
    assert (CONFIGS / "schema.json").read_text(encoding="utf-8") == schema_text(), STALE


def test_the_schema_knows_every_key_in_both_spellings() -> None:
    properties = json.loads(schema_text())["properties"]
    assert {name.replace("-", "_") for name in properties} == set(FIELDS)
    assert properties["train-iters"] == {"$ref": "#/properties/train_iters"}
    assert schema()["properties"]["train_iters"]["type"] == ["integer", "null"]
    assert schema()["properties"]["norm"]["enum"][0] == "layernorm"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yml")), ids=lambda path: path.stem)
def test_shipped_files_fit_the_schema(path: Path) -> None:
    properties = schema()["properties"]
    kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list, "object": dict}
    for name, value in (yaml.safe_load(path.read_text()) or {}).items():
        reported = properties[name]
        reported = properties[reported["$ref"].rpartition("/")[2]] if "$ref" in reported else reported
        if "enum" in reported:
            assert value in reported["enum"], name
            continue
        forms = reported.get("anyOf", [reported])
        names = [kind for form in forms for kind in ([form["type"]] if isinstance(form["type"], str) else form["type"])]
        assert any(kind != "null" and isinstance(value, kinds[kind]) for kind in names) or value is None, name
