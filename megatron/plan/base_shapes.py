"""The file of base shapes that muP compares a model with: written from a configuration, and held against another.

It is JSON: `format`, the `widths` of the base model, and `tensors`, which names every tensor of the base model with the
size of each dimension that grows with the widths and null for one that does not. Widths alone say everything that
training needs; the tensors are for people, for other programs, and for telling a base of another architecture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.config import Config
from megatron.config.defaults.mup import FORMAT, read_base_shapes
from megatron.errors import ConfigError
from megatron.param_table import ModelDims, Widths, base_shapes

SHOWN = 3  # tensors that an error names


def write_base_shapes(config: Config) -> Path:
    """Writes the configured model as a base into base_shapes_file. ConfigError where the file cannot be written."""
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    widths = Widths.of(dims)
    assert config.mup.base_shapes_file is not None, "a rule asks for it"
    path = Path(config.mup.base_shapes_file)
    rows = [f"  {json.dumps(key)}: {json.dumps(shape)}" for key, shape in base_shapes(dims, widths).items()]
    text = (
        f'{{\n "format": {json.dumps(FORMAT)},\n "widths": {json.dumps(asdict(widths))},\n "tensors": {{\n'
        + ",\n".join(rows)
        + "\n }\n}\n"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"the file cannot be written ({error.strerror})"
        raise ConfigError.of(what, key="base_shapes_file", value=str(path)) from error
    return path


def check_base_shapes(config: Config) -> None:
    """ConfigError where the file of base shapes is of a model that differs from the configured one in more than widths.

    Nothing is checked of a configuration that reads no such file.
    """
    mup = config.mup
    if mup.base_shapes_file is None or mup.mup_base_widths is None:
        return
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    stored = read_base_shapes(mup.base_shapes_file)["tensors"]
    try:
        wanted = base_shapes(dims, Widths(**mup.mup_base_widths))
    except ValueError as error:
        raise ConfigError.of(
            f"its widths make no model: {error}", key="base_shapes_file", value=mup.base_shapes_file
        ) from error
    told = _differences(stored, {key: list(shape) for key, shape in wanted.items()})
    if told:
        raise ConfigError.of(
            f"it is the base of another architecture: {told}",
            key="base_shapes_file",
            value=mup.base_shapes_file,
            hint="write it again from a configuration that differs from this one in widths alone (blocks and all "
            "other parts alike); nothing has to be trained for it",
        )


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    errors = {
        "it lacks": [key for key in wanted if key not in stored],
        "it alone has": [key for key in stored if key not in wanted],
        "it has another shape of": [key for key in wanted if key in stored and stored[key] != wanted[key]],
    }
    return ", ".join(
        f"{what} {', '.join(keys[:SHOWN])}" + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
        for what, keys in errors.items()
        if keys
    )
