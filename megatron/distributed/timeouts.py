"""Timeouts of collectives, and the collective that a rank waits in.

torch gives every process group but the first its own default of half an hour (gloo), and DeepSpeed creates groups of
its own; so the timeout is set on each of them. The collective that a rank waits in is read from torch's flight
recorder, which keeps the last collectives of every group, and from the stacks of its threads.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

RECORDED = 2000  # collectives that the flight recorder keeps
_WRAPPERS = ("wrapper", "wrapped", "barrier_wrapper")
_COLLECTIVE_FILES = (os.path.join("torch", "distributed", "distributed_c10d.py"), os.path.join("deepspeed", "comm"))


def record_collectives() -> None:
    """Enables torch's flight recorder; must be called before the first process group is created."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED))
    if torch.__version__ < "2.13":  # later releases warn of the older name
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", str(RECORDED))


def set_collective_timeout(seconds: float) -> None:
    """Sets the timeout of collectives on every existing process group [s]."""
    if not dist.is_initialized():
        return
    for group in list(distributed_c10d._world.pg_map):
        if isinstance(group, dist.ProcessGroup):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def flight_record() -> str:
    """Returns the last collectives of this process as JSON, in the format of torchfrtrace; "" if there are none."""
    dump: Any = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    return "" if dump is None else dump(True, False).decode()


def stack_summary(thread: int) -> str:
    """Returns the innermost four frames of a thread: `function (file:line) < ...`."""
    frame = sys._current_frames().get(thread)
    frames: list[str] = []
    while frame is not None and len(frames) < 4:
        code = frame.f_code
        frames.append(f"{code.co_name} ({_short(code.co_filename)}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(frames)


def collective_in_progress(thread: int) -> str | None:
    """Returns the name of the collective that a thread is in ("all_reduce"), or None.

    A CUDA collective continues after its call has returned; the flight recorder shows those.
    """
    frame = sys._current_frames().get(thread)
    found = None
    while frame is not None:
        found = _collective_name(frame) or found
        frame = frame.f_back
    return found


def _collective_name(frame: FrameType) -> str | None:
    code = frame.f_code
    is_collective = any(path in code.co_filename for path in _COLLECTIVE_FILES)
    return code.co_name if is_collective and code.co_name not in _WRAPPERS else None


def _short(path: str) -> str:
    return os.path.join(*path.split(os.sep)[-2:])


def device_collective_in_progress() -> str | None:
    """Returns the name of the NCCL collective that the device has not finished, or None."""
    for entry in reversed(json.loads(flight_record() or "{}").get("entries", [])):
        if entry["profiling_name"].startswith("nccl") and not entry["retired"]:
            return str(entry["profiling_name"])
    return None


def failed_in_a_collective(error: BaseException) -> bool:
    """Returns whether the exception was caused by other ranks that are missing from a collective."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "nccl", "connection closed by"))
