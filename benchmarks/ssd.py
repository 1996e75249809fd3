"""Time and error of Mamba-2's state space, forward and backward, beside the plain function of transformers.

    python benchmarks/ssd.py [--length 2048] [--heads 12] [--groups 1] [--rounds 5] [--processor-time]

Heads of 64 features, 128 states, micro batch 1, rates and steps as at the start of training, fp32. Rounds alternate;
it prints medians, and the largest error beside a recurrence in float64, as a fraction of the largest value.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.kernels.ssd import chunk_scan

SIZE, STATES, CHUNK = 64, 128, 256


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="positions [tokens]")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="count the processor's time, one thread")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    if args.processor_time:
        torch.set_num_threads(1)
    given = inputs(args.length, args.heads, args.groups)
    forms: dict[str, Callable[..., Tensor]] = {
        "this": lambda *values: chunk_scan(*values)[0],
        "transformers": lambda *values: mamba2_chunk_scan(*values, CHUNK),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(args.rounds + 1):
        for name, form in forms.items():
            began = clock()
            form(*(value.requires_grad_() for value in given)).sum().backward()
            times[name].append(clock() - began)
    target = recurrence([value.detach().double() for value in given])
    print("| form | time [s] | error |\n|---|---|---|")
    for name, form in forms.items():
        with torch.no_grad():
            apart = float((form(*given).double() - target).abs().max() / target.abs().max())
        print(f"| {name} | {statistics.median(times[name][1:]):.3f} | {apart:.1e} |")


def inputs(length: int, heads: int, groups: int) -> list[Tensor]:
    """Returns x, the steps, the rates, B and C."""
    torch.manual_seed(0)
    x, into, out = (torch.randn(1, length, *sizes) for sizes in ((heads, SIZE), (groups, STATES), (groups, STATES)))
    step = torch.empty(1, length, heads).uniform_(-6.9, -2.3).exp_()
    return [x, step, -torch.empty(heads).uniform_(1, 16), into, out]


def recurrence(values: list[Tensor]) -> Tensor:
    """Returns y, position by position."""
    x, step, rate, into, out = values
    heads = x.shape[2] // into.shape[2]
    into, out = (value.repeat_interleave(heads, 2).unsqueeze(3) for value in (into, out))
    state, rows = torch.zeros(1, x.shape[2], SIZE, STATES, dtype=x.dtype), []
    for t in range(x.shape[1]):
        fed = (step[:, t].unsqueeze(-1) * x[:, t]).unsqueeze(-1) * into[:, t]
        state = torch.exp(step[:, t] * rate)[..., None, None] * state + fed
        rows.append((state * out[:, t]).sum(-1))
    return torch.stack(rows, 1)


if __name__ == "__main__":
    main()
