"""Lets a torch that was built for the CPU take fake tensors on "cuda", gradients included; imported before torch.

FakeTensorMode computes shapes, types and devices, and raises where devices mix or the host would wait for a value. A
CPU build lacks a device guard and hooks for cuda; fake_cuda.cpp has ones that do nothing, compiled once. torch asks for
the hooks while it is imported, so a process that uses this is one of its own.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if "torch" in sys.modules:
    raise ImportError("fake_cuda is imported before torch")

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
TORCH = Path(importlib.util.find_spec("torch").origin or "").parent  # type: ignore[union-attr]
LIBRARY = Path(tempfile.gettempdir()) / f"libfakecuda-{importlib.metadata.version('torch')}-{os.getuid()}.so"


def build() -> None:
    """Compiles the library, where that was not done since its source changed."""
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    partial = LIBRARY.with_suffix(f".{os.getpid()}")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{TORCH}/include", "-o", str(partial), str(SOURCE)]
    subprocess.run([*command, f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"], check=True)
    partial.rename(LIBRARY)


build()
ctypes.CDLL(str(TORCH / "lib/libtorch_cpu.so"))
_library = ctypes.CDLL(str(LIBRARY))

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
WITHOUT_KERNEL = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten._unsafe_view, _aten.detach}


class FakeGPU(FakeTensorMode):
    """All tensors are fake: mixed devices raise at once, and so does whatever needs a value that only a GPU knows."""

    avoid_device_init = True  # no real tensor is made on a device that does not exist

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel: all but views and the making of empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view and func.overloadpacket not in WITHOUT_KERNEL:
            self.count += 1
        return func(*args, **(kwargs or {}))


class OneKernelAttention(torch.autograd.Function):
    """Stands for a flash kernel: one launch forward, one backward; on a fake GPU torch takes single operations."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.zeros_like(q)  # counted as the kernel

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = ctx.saved_tensors
        return torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)


def one_kernel_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Takes the place of scaled_dot_product_attention while launches are counted."""
    attended: torch.Tensor = OneKernelAttention.apply(q, k, v)
    return attended


def pretend() -> None:
    """Has torch.cuda report one GPU; a synchronization with it raises."""

    def synchronize(*_: Any) -> None:
        raise RuntimeError("torch.cuda.synchronize makes the host wait")

    fake_tensor.init_gpu_context = lambda *_: None  # it would make a real tensor
    properties = type("Properties", (), {"multi_processor_count": 132, "major": 9, "minor": 0})()
    values = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "set_device": None,
        "get_device_capability": (9, 0),
        "get_device_name": "fake",
        "get_device_properties": properties,
    }
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    torch.cuda.synchronize = synchronize


def onto_gpu(module: Module) -> None:
    """Gives a module fake parameters and buffers on the GPU, shared ones still shared; called inside the mode."""
    made: dict[int, Any] = {}

    def moved(old: Any) -> Any:
        if id(old) not in made:
            new = torch.empty_like(old, device=DEVICE)
            if isinstance(old, Parameter):
                new = Parameter(new, old.requires_grad)
                for name, mark in vars(old).items():
                    vars(new).setdefault(name, mark)
            made[id(old)] = new
        return made[id(old)]

    for part in module.modules():
        for values in (part._parameters, part._buffers):
            values.update({name: moved(value) for name, value in values.items() if value is not None})
