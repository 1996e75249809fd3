"""Type in which gradients are accumulated, derived from the precision: DeepSpeed's block data_types."""

from __future__ import annotations

from typing import Any

Table = dict[str, Any]


def derive_data_types(precision: str, data_types: Table | None) -> Table | None:
    """Returns the data_types block: gradients of a bfloat16 model accumulate in fp32 by default."""
    if precision == "bfloat16" and not (data_types or {}).get("grad_accum_dtype"):
        return {**(data_types or {}), "grad_accum_dtype": "fp32"}
    return data_types
