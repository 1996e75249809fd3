#!/usr/bin/env python
"""Finds the first iteration, layer and rank at which two runs differ.

    python tools/compare_runs.py RUN_DIR RUN_DIR [--tolerance 0]

Both runs must have been made on the same layout with `fingerprint_interval: N`. With a tolerance of 0 every bit must
be the same; otherwise norms may differ by that much, relative. The first difference in the weights means that the
update before differed, in an activation that the forward pass did, in a gradient that the backward pass did. Exits
with 0 where the runs agree, 1 where they differ, 2 where they cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError
from megatron.metrics.fingerprint import read_fingerprints
from megatron.output_streams import run_tool

Record = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """The first difference of one rank."""

    rank: int
    """The rank."""
    position: int
    """Index of the record."""
    one: Record
    """Record of the first run."""
    other: Record
    """Record of the second run."""

    def __str__(self) -> str:
        one, other = self.one, self.other
        if one["layer"] != other["layer"] or one["what"] != other["what"]:
            what = f"{one['what']} of layer {one['layer']} against {other['what']} of layer {other['layer']}"
            return f"rank {self.rank}, iteration {one['iteration']}: the runs do different things: {what}"
        apart = relative(one["norm"], other["norm"])
        return (
            f"rank {self.rank}, iteration {one['iteration']}, micro batch {one['micro_batch']}, layer {one['layer']}: "
            f"{one['what']} with norm {one['norm']:.9g} against {other['norm']:.9g}, {apart:.1e} apart"
        )


def relative(one: float, other: float) -> float:
    """Returns the relative difference of two numbers; infinite where one is not finite."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return 0.0 if one == other else math.inf
    return abs(one - other) / max(abs(one), abs(other), 1e-300)


def agree(one: Record, other: Record, tolerance: float) -> bool:
    """Returns whether two records are of the same tensor and agree within the tolerance."""
    if any(one[name] != other[name] for name in ("iteration", "micro_batch", "what", "layer")):
        return False
    return one["bits"] == other["bits"] if tolerance == 0 else relative(one["norm"], other["norm"]) <= tolerance


def first_differences(runs: tuple[Path, Path], tolerance: float) -> tuple[list[Difference], int]:
    """Returns the first difference of each rank, earliest first, and the number of records compared.

    Raises ConfigError where the runs cannot be compared.
    """
    first, second = (read_fingerprints(run) for run in runs)
    for run, found in zip(runs, (first, second), strict=True):
        if not found:
            raise ConfigError.of(
                "there are no fingerprints", location=str(run), hint="run with fingerprint_interval: 1"
            )
    if first.keys() != second.keys():
        raise ConfigError.of(f"the runs have {len(first)} and {len(second)} ranks", hint="compare runs of one layout")
    differences, compared = [], 0
    for rank, records in first.items():
        pairs = list(zip(records, second[rank], strict=False))
        compared += len(pairs)
        for position, (one, other) in enumerate(pairs):
            if not agree(one, other, tolerance):
                differences.append(Difference(rank, position, one, other))
                break
    return sorted(differences, key=lambda found: (found.one["iteration"], found.position)), compared


def main(arguments: list[str] | None = None) -> int:
    """Prints the first differences; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN_DIR", help="the log_dir of a run")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference of norms; 0: every bit")
    options = parser.parse_args(arguments)
    try:
        differences, compared = first_differences(tuple(options.runs), options.tolerance)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if not differences:
        print(f"{compared} fingerprints agree")
        return 0
    print(f"first difference: {differences[0]}")
    for found in differences[1:]:
        print(f"      also there: {found}")
    return 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
