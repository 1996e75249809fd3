"""Writes the base shapes file of muP, and compares it with a configuration.

It is JSON: `format`, the `widths` of the base model, and `tensors`, which maps every tensor of the base model to the
sizes of its dimensions that grow with the widths, with null for the others. Training needs the widths only; the tensors
are for readers, for other programs, and to detect a base of another architecture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.config import Config
from megatron.config.derived.mup import FORMAT, read_base_shapes
from megatron.errors import ConfigError
from megatron.param_table import ModelDims, MupWidths, base_shapes

MAX_NAMED = 3  # tensors that an error names


def write_base_shapes(config: Config) -> Path:
    """Writes the configured model as a base into base_shapes_file. Raises ConfigError when it cannot be written."""
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    widths = MupWidths.of(dims)
    assert config.mup.base_shapes_file is not None, "a rule requires it"
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
    """Raises ConfigError when the base model differs from the configured one in more than widths.

    Does nothing without a base shapes file.
    """
    mup = config.mup
    if mup.base_shapes_file is None or mup.mup_base_widths is None:
        return
    dims = ModelDims.of(config.model, config.moe, config.mixers)
    stored = read_base_shapes(mup.base_shapes_file)["tensors"]
    try:
        expected = base_shapes(dims, MupWidths(**mup.mup_base_widths))
    except ValueError as error:
        raise ConfigError.of(
            f"its widths make no model: {error}", key="base_shapes_file", value=mup.base_shapes_file
        ) from error
    message = _differences(stored, {key: list(shape) for key, shape in expected.items()})
    if message:
        raise ConfigError.of(
            f"it is the base of another architecture: {message}",
            key="base_shapes_file",
            value=mup.base_shapes_file,
            hint="write it again from a configuration that differs from this one in widths alone (blocks and all "
            "other parts alike); nothing has to be trained for it",
        )


def _differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    errors = {
        "it lacks": [key for key in expected if key not in stored],
        "it alone has": [key for key in stored if key not in expected],
        "it has another shape of": [key for key in expected if key in stored and stored[key] != expected[key]],
    }
    return ", ".join(
        f"{what} {', '.join(keys[:MAX_NAMED])}"
        + (f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else "")
        for what, keys in errors.items()
        if keys
    )
