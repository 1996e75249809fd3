"""Compiles every Triton kernel ahead of time, without a GPU, and prints its registers, spills and shared memory.

    python -m benchmarks.kernel_resources [--target sm_90] [--write docs/performance.md]

The operations run on CPU tensors in bfloat16 at the sizes of a 7B model, with a launcher that notes the kernels and
their arguments in place of starting them; each kernel is then compiled for each target.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.tables import write_between
from megatron.kernels.cross_entropy import GradientSpec
from megatron.kernels.newton_schulz import STANDARD, coefficients
from megatron.kernels.triton import (
    activations,
    cross_entropy,
    dropout_add,
    newton_schulz,
    norms,
    permute,
    rotary,
    runtime,
    softmax,
)
from megatron.registry.kernels import interpreted

BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
HIDDEN, WIDTH, VOCABULARY, ROWS, HEADS, HEAD_DIM = 4096, 11008, 131_072, 4, 32, 128
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.uint8: "u8"}


@dataclass(frozen=True)
class Launch:
    """A kernel with the types of its arguments."""

    kernel: Any
    """The function decorated with triton.jit."""
    signature: tuple[tuple[str, str], ...]
    """Parameter -> type."""
    constants: tuple[tuple[str, Any], ...]
    """Parameter -> value that is known when it is compiled."""
    aligned: tuple[int, ...]
    """Positions of the arguments that are multiples of 16."""
    num_warps: int
    """Warps of a program."""

    @property
    def name(self) -> str:
        """Name of the kernel, with the choices that were compiled in."""
        chosen = [
            value if isinstance(value, str) else key.lower()
            for key, value in self.constants
            if value is True or isinstance(value, str)
        ]
        return f"{self.kernel.__name__}({', '.join(chosen)})"


@dataclass(frozen=True)
class Resources:
    """What a program of a compiled kernel needs."""

    kernel: str
    """Name of the kernel."""
    target: str
    """Architecture."""
    registers: int
    """Registers of a thread."""
    spilled: int
    """Bytes of a thread, or registers on AMD, that did not fit into registers."""
    shared: int
    """Shared memory [bytes]."""
    wide_loads: int
    """Loads of 16 bytes."""


class Recorder:
    """Notes launches in place of starting them."""

    def __init__(self) -> None:
        self.launches: dict[tuple[Any, ...], Launch] = {}

    def __call__(self, kernel: Any, grid: Sequence[int], *args: Any, num_warps: int = 4, **constants: Any) -> None:
        """As runtime.launch."""
        names = kernel.arg_names
        signature, fixed, aligned = {}, dict(constants), []
        for position, (name, value) in enumerate(zip(names, args, strict=False)):
            signature[name] = _type_of(value)
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                aligned.append(position)
        signature |= dict.fromkeys(fixed, "constexpr")
        launch = Launch(kernel, tuple(signature.items()), tuple(fixed.items()), tuple(aligned), num_warps)
        self.launches.setdefault((kernel.__name__, launch.signature, launch.constants), launch)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def operations() -> Iterator[Tensor]:
    """Runs every operation forward and yields its result, to be differentiated."""

    def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    x, residual, weight, bias = values(ROWS, HIDDEN), values(ROWS, HIDDEN), values(HIDDEN), values(HIDDEN)
    yield norms.rms_norm(x, weight, 1e-5)
    yield norms.layer_norm(x, weight, bias, 1e-5)
    yield from norms.add_rms_norm(x, residual, weight, 1e-5)[:1]
    yield from norms.add_layer_norm(x, residual, weight, bias, 1e-5)[:1]
    for name in (*activations.PLAIN, *activations.GATED):
        width = WIDTH * (2 if name in activations.GATED else 1)
        yield activations.bias_activation(values(ROWS, width), values(width), name)
    yield activations.bias_activation(values(ROWS, 2 * WIDTH), None, "swiglu")
    yield dropout_add.bias_dropout_add(x, bias, residual, 0.1)
    table = torch.ones(ROWS, HEAD_DIM // 2)
    for positions in (None, torch.zeros(1, ROWS, dtype=torch.int64)):
        for interleaved in (False, True):
            q, k = values(1, HEADS, ROWS, HEAD_DIM), values(1, HEADS, ROWS, HEAD_DIM)
            yield rotary.rotary_pair(q, k, table, table, positions=positions, interleaved=interleaved)[0]
    q, quarter = values(1, HEADS, ROWS, HEAD_DIM), table[:, : HEAD_DIM // 8]
    yield rotary.rotary_pair(q, q, quarter, quarter)[0]
    yield softmax.causal_softmax(values(1, 1, 16, HIDDEN), 1.0)
    yield softmax.masked_softmax(values(1, 1, 16, HIDDEN), torch.ones(1, 1, 16, HIDDEN, dtype=torch.bool), 1.0)
    with torch.no_grad():
        logits, scale = values(ROWS, VOCABULARY), torch.ones(ROWS)
        cross_entropy.softmax_pass(logits, GradientSpec(torch.zeros(ROWS, dtype=torch.int64), scale, scale, logits))
        # Its other product runs on the CPU; the kernel is the same for any multiple of 16.
        newton_schulz.orthogonalize(values(256, 256), coefficients(STANDARD, 1))
    order, inverse = torch.arange(2 * ROWS), torch.arange(2 * ROWS)
    yield permute.permute(x, order, inverse)
    yield permute.combine(values(2 * ROWS, HIDDEN), values(ROWS, 2), order, inverse)


def launches() -> list[Launch]:
    """Every kernel that the operations start, forward and backward."""
    recorder, original = Recorder(), runtime.launch
    runtime.launch = recorder  # type: ignore[assignment]
    try:
        for result in operations():
            result.sum().backward()
    finally:
        runtime.launch = original
    return list(recorder.launches.values())


def compiled(launch: Launch, target: str) -> Resources:
    """Compiles a kernel for a target."""
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(position,): [["tt.divisibility", 16]] for position in launch.aligned},
    )
    built = triton.compile(source, target=TARGETS[target], options={"num_warps": launch.num_warps})
    shared = int(built.metadata.shared)
    if TARGETS[target].backend == "cuda":
        registers, spilled = _cuda_usage(built.asm["cubin"])
        wide = len(re.findall(r"ld\.global\S*\.v4|ld\.global\S*\.v8", built.asm["ptx"]))
    else:
        assembly = built.asm["amdgcn"]
        registers, spilled = (int(_found(rf"\.{key}:\s+(\d+)", assembly)) for key in ("vgpr_count", "vgpr_spill_count"))
        wide = len(re.findall(r"(?:buffer|global)_load_dwordx4", assembly))
    return Resources(launch.name, target, registers, spilled, shared, wide)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(_found(rf"{key}:(\d+)", done.stdout)) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the description of the compiled kernel")
    return match[1]


def table(found: Sequence[Resources]) -> list[str]:
    """A line a kernel: registers of a thread and shared memory of a program on each target, and loads of 16 bytes."""
    targets = list(dict.fromkeys(each.target for each in found))
    rows: dict[str, dict[str, Resources]] = {}
    for each in found:
        rows.setdefault(each.kernel, {})[each.target] = each
    lines = ["| kernel | " + " | ".join(targets) + " | spilled | 16-byte loads |", "|---" * (len(targets) + 3) + "|"]
    for kernel, by_target in rows.items():
        cells = [f"{by_target[target].registers}, {by_target[target].shared:,} B" for target in targets]
        spilled, wide = (max(getattr(each, key) for each in by_target.values()) for key in ("spilled", "wide_loads"))
        lines.append(f"| `{kernel}` | {' | '.join(cells)} | {spilled} | {wide} |")
    return lines


def main() -> None:
    """Compiles all kernels, prints a JSON line for each and, if asked, writes their table into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="architecture; all unless given")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()
    if interpreted():
        sys.exit("error: TRITON_INTERPRET=1 is set, and interpreted kernels cannot be compiled; unset it")
    work = [(launch, target) for target in arguments.target or TARGETS for launch in launches()]
    with ThreadPoolExecutor(2) as pool:
        found = []
        for each in pool.map(lambda pair: compiled(*pair), work):
            print(json.dumps(asdict(each)), flush=True)
            found.append(each)
    if arguments.write:
        write_between(arguments.write, BEGIN, END, table(found))


if __name__ == "__main__":
    main()
