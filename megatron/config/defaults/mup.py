"""The base model of muP, as its file tells it. megatron/plan/base_shapes.py writes the file and compares it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError

FORMAT = "neox base shapes 1"
WIDTHS = ("hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "mlp_width")
_REMEDY = "write it with ./deepy.py train.py BASE_CONF --save-base-shapes true --base-shapes-file FILE"


def read_base_shapes(path: str) -> dict[str, Any]:
    """What a file of base shapes holds: `widths` and `tensors`. Raises ConfigError where it is no such file."""

    def refused(what: str) -> ConfigError:
        return ConfigError.of(what, key="base_shapes_file", value=path, hint=_REMEDY)

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise refused(f"the file cannot be read ({error.strerror})") from error
    except ValueError as error:  # of JSON or of its encoding
        raise refused("it is no file of base shapes: it is not JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise refused(f"it is no file of base shapes: its format is not {FORMAT!r}")
    widths, shapes = content.get("widths"), content.get("tensors")
    whole = isinstance(widths, dict) and set(widths) == set(WIDTHS) and all(map(_is_size, widths.values()))
    if not whole or not isinstance(shapes, dict):
        raise refused("it is damaged: it names no widths or no tensors")
    return {"widths": widths, "tensors": shapes}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
