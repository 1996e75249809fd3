#!/usr/bin/env python
"""Shows the content of a checkpoint and whether it is intact; compares two.

    python tools/inspect_checkpoint.py checkpoints/my-model [--iteration N] [--norms] python tools/inspect_checkpoint.py
    --compare A B [--tolerance 0]

The first prints the files, their damage, the run's counters, layout and versions, and every tensor with its shape,
type and (--norms) norm. The second prints the differences of two checkpoints of any layouts, tensor by tensor; it exits
with 1 where one is larger than the tolerance. Both read every file's content, and run no code of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.checkpoint.format import files, integrity, layout
from megatron.checkpoint.format.optimizer_shards import OptimizerState
from megatron.checkpoint.format.weight_shards import key_of
from megatron.checkpoint.load.stored_model import StoredModel, choose, open_model
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(description="Inspect checkpoints.")
    result.add_argument("path", type=Path, nargs="?", help="a save folder or one checkpoint")
    result.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two of them")
    result.add_argument("--iteration", type=int, help="checkpoint to take (default: the latest)")
    result.add_argument("--norms", action="store_true", help="compute each tensor's norm")
    result.add_argument("--tolerance", type=float, default=0.0, help="largest difference that is none (default: 0)")
    result.add_argument(
        "--config-file", "--config_file", type=Path, nargs="+", default=[], help="YAML files that describe the model"
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where something is damaged or different, or 2 for an error."""
    args = parser().parse_args(arguments)
    if (args.path is None) == (args.compare is None):
        print("give one checkpoint, or two with --compare", file=sys.stderr)
        return 2
    try:
        if args.compare:
            first, second = (open_model(path, config_files=args.config_file) for path in args.compare)
            return _compare(first, second, args.tolerance)
        return _show(choose(args.path, args.iteration), args.config_file, norms=args.norms)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _show(directory: Path, config_files: list[Path], *, norms: bool) -> int:
    print(directory)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        print(f"  {path.relative_to(directory)!s:46} {path.stat().st_size:>16,} bytes")
    errors = integrity.damage(directory, contents=True) if integrity.is_ours(directory) else []
    for error in errors:
        print(f"damaged: {error}")
    if not errors:
        print(
            "intact: every file is as it was written" if integrity.is_ours(directory) else "written by another program"
        )
    run = directory / layout.RUN
    if run.is_file():
        for topic, facts in files.read_json(run).items():
            text = ", ".join(f"{k} {v}" for k, v in facts.items()) if isinstance(facts, dict) else facts
            print(f"{topic}: {text}")
    if errors:
        return 1
    stored = open_model(directory, config_files=config_files)
    total = 0
    for shape in stored.table:
        tensor = stored.full_tensor(shape)
        total += tensor.numel()
        line = f"{key_of(shape):44} {list(tensor.shape)!s:18} {str(tensor.dtype).removeprefix('torch.'):9}"
        print(f"{line} norm {tensor.float().norm():.6g}" if norms else line.rstrip())
    print(f"{len(stored.table)} tensors, {total:,} parameters")
    return 0


def _compare(first: StoredModel, second: StoredModel, tolerance: float) -> int:
    print(f"A {first.directory}\nB {second.directory}")
    ours, theirs = ({key_of(shape): shape for shape in each.table} for each in (first, second))
    apart = 0
    for key in sorted(ours.keys() ^ theirs.keys()):
        apart += 1
        print(f"{key}: only in {'A' if key in ours else 'B'}")
    for key in (key for key in ours if key in theirs):
        a, b = first.full_tensor(ours[key]), second.full_tensor(theirs[key])
        if a.shape != b.shape:
            apart += 1
            print(f"{key}: {list(a.shape)} and {list(b.shape)}")
            continue
        furthest = float((a.float() - b.float()).abs().max())
        if furthest > tolerance or furthest != furthest:
            apart += 1
            print(f"{key}: {furthest:.3g} apart at most")
    for line in _state_differences(first, second, tolerance):
        apart += 1
        print(line)
    print(f"{apart} differences" if apart else f"equal: {len(ours)} tensors and the optimizer state")
    return int(apart > 0)


def _state_differences(first: StoredModel, second: StoredModel, tolerance: float) -> Iterator[str]:
    """Yields differences of the optimizer's state, if both have one."""
    a, b = (_state(each) for each in (first, second))
    if a is None or b is None:
        if (a is None) != (b is None):
            yield f"optimizer state: only in {'B' if a is None else 'A'}"
        return
    for shape in first.table:
        key = key_of(shape)
        for name in sorted({*a.names(key), *b.names(key)}):
            if name not in a.names(key) or name not in b.names(key):
                yield f"{key} {name}: only in {'A' if name in a.names(key) else 'B'}"
                continue
            parts = [each.shard(key, name, model_rank=0, model_size=1) for each in (a, b)]
            furthest = float((parts[0] - parts[1]).abs().max())
            if not furthest <= tolerance:
                yield f"{key} {name}: {furthest:.3g} apart at most"


def _state(stored: StoredModel) -> OptimizerState | None:
    return OptimizerState.open(stored.directory, {key_of(shape): shape for shape in stored.table})


if __name__ == "__main__":
    sys.exit(run_tool(main))
