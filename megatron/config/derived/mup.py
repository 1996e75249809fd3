"""Reads the base shapes file of muP. megatron/plan/base_shapes.py writes and compares it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError

FORMAT = "neox base shapes 1"
WIDTHS = ("hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "mlp_width")
_HINT = "write it with ./deepy.py train.py BASE_CONF --save-base-shapes true --base-shapes-file FILE"


def read_base_shapes(path: str) -> dict[str, Any]:
    """Returns `widths` and `tensors` of a base shapes file. Raises ConfigError where it is no such file."""

    def read_error(what: str) -> ConfigError:
        return ConfigError.of(what, key="base_shapes_file", value=path, hint=_HINT)

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise read_error(f"the file cannot be read ({error.strerror})") from error
    except ValueError as error:  # of JSON or of its encoding
        raise read_error("it is no file of base shapes: it is not JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise read_error(f"it is no file of base shapes: its format is not {FORMAT!r}")
    widths, shapes = content.get("widths"), content.get("tensors")
    complete = isinstance(widths, dict) and set(widths) == set(WIDTHS) and all(map(_is_size, widths.values()))
    if not complete or not isinstance(shapes, dict):
        raise read_error("it is damaged: it names no widths or no tensors")
    return {"widths": widths, "tensors": shapes}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
