"""Compiles what the tests load, beside the installation, which waits for packages: `python -m tests.compiled`.

Compiled libraries are stored outside the checkout, by environment, so that the tests find them.
"""

from __future__ import annotations

import contextlib
import sys

from deepspeed.ops.op_builder import CPUAdamBuilder

from megatron.distributed.op_build import build_lock
from megatron.kernels.cpp_build import library_unavailable


def compile_all() -> None:
    """Compiles the kernels of csrc/ and DeepSpeed's Adam for the CPU, each if it is not compiled yet."""
    reason = library_unavailable()
    if reason is not None:
        sys.exit(reason)
    with contextlib.redirect_stdout(sys.stderr), build_lock(CPUAdamBuilder()):
        CPUAdamBuilder().load(verbose=False)


if __name__ == "__main__":
    compile_all()
