"""Writes configs/README.md (every key) and configs/schema.json (JSON Schema for editors) from the sections.

Run `python -m megatron.config.docs_generator` after a change of a section; a test fails while they are stale.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_origin

from megatron.config.config import FIELDS, SECTIONS, FieldInfo
from megatron.config.type_names import item_type, short_type_name, union_members

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", type(None): "null"}

HEAD = """# Every configuration key

This page is generated from `megatron/config/schema/` by `python -m megatron.config.docs_generator`.

A configuration is any number of YAML or JSON files with these keys at the top level, merged without an order of
precedence: a key that two files give is an error. Dashes and underscores are the same (`train-iters`). Each key is
also a flag of `deepy.py` (`--train-iters 100`), which wins over files. `--dry-run` shows the resolved values, where
each one comes from, and what the run will cost. An editor that knows YAML schemas completes and checks the keys with

```yaml
# yaml-language-server: $schema=schema.json
```

A default of `null` means that the value is derived from others, found at launch, or simply absent; the text says which.
"""


def key_table() -> str:
    """Returns the text of configs/README.md."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        module_doc = (section.__doc__ or "").strip().splitlines()[0]
        parts.append(
            f"\n## {name}\n\n{module_doc}\n\n| key | type | unit | default | meaning |\n|---|---|---|---|---|\n"
        )
        parts += [_row(field) for field in FIELDS.values() if field.section == name]
    return "".join(parts)


def _row(field: FieldInfo) -> str:
    doc = field.doc
    if field.choices:
        doc += " Choices: " + ", ".join(f"`{choice}`" for choice in field.choices) + "."
    default = json.dumps(field.default)
    cells = (f"`{field.name}`", short_type_name(field.annotation), field.unit or "", f"`{default}`", doc)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def schema() -> dict[str, Any]:
    """Returns the JSON schema: every key, in both spellings."""
    properties: dict[str, Any] = {}
    for name, field in FIELDS.items():
        properties[name] = _property(field)
        if "_" in name:
            properties[name.replace("_", "-")] = {"$ref": f"#/properties/{name}"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "NeoX configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _property(field: FieldInfo) -> dict[str, Any]:
    unit = f" [{field.unit}]" if field.unit else ""
    property_schema: dict[str, Any] = {"description": field.doc + unit, "default": field.default}
    if field.annotation is Any:
        return property_schema
    if field.choices and all(member in (str, type(None)) for member in union_members(field.annotation)):
        optional = type(None) in union_members(field.annotation)
        return {**property_schema, "enum": [*field.choices, *([None] if optional else [])]}
    forms = [_form(member) for member in union_members(field.annotation)]
    if all(set(form) == {"type"} for form in forms):
        types = [form["type"] for form in forms]
        return {**property_schema, "type": types[0] if len(types) == 1 else types}
    return {**property_schema, **(forms[0] if len(forms) == 1 else {"anyOf": forms})}


def _form(member: Any) -> dict[str, Any]:
    if get_origin(member) is tuple:
        inner = item_type(member)
        return {"type": "array", **({"items": {"type": SCHEMA_TYPES[inner]}} if inner in SCHEMA_TYPES else {})}
    return {"type": SCHEMA_TYPES[get_origin(member) or member]}


def schema_text() -> str:
    """Returns the text of configs/schema.json."""
    return json.dumps(schema(), indent=1) + "\n"


def write(folder: Path = ROOT / "configs") -> None:
    """Writes both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(key_table(), encoding="utf-8")
    (folder / "schema.json").write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    write()
