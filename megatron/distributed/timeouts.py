"""How long a rank may wait for the others, and what it was waiting in.

torch gives every process group but the first its own default of half an hour (gloo), and DeepSpeed makes groups of its
own; a limit that holds must be set on each of them. What a rank waits in is read from torch's flight recorder, which
keeps the last collectives of every group, and from the stacks of its threads.
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
_PLUMBING = ("wrapper", "wrapped", "barrier_wrapper")
_TALKING = (os.path.join("torch", "distributed", "distributed_c10d.py"), os.path.join("deepspeed", "comm"))


def record_collectives() -> None:
    """Switches torch's flight recorder on; before the first process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED))
    if torch.__version__ < "2.13":  # later releases warn of the older name
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", str(RECORDED))


def set_collective_timeout(seconds: float) -> None:
    """No collective of any process group that exists by now may wait longer [s]."""
    if not dist.is_initialized():
        return
    for group in list(distributed_c10d._world.pg_map):
        if isinstance(group, dist.ProcessGroup):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def flight_record() -> str:
    """The last collectives of this process as JSON, in the format that torchfrtrace reads; "" where there are none."""
    dump: Any = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    return "" if dump is None else dump(True, False).decode()


def standing(thread: int) -> str:
    """Where a thread of this process stands, innermost first: `function (file:line) < ...`, four callers deep."""
    frame = sys._current_frames().get(thread)
    places: list[str] = []
    while frame is not None and len(places) < 4:
        code = frame.f_code
        places.append(f"{code.co_name} ({_short(code.co_filename)}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(places)


def collective_in_progress(thread: int) -> str | None:
    """The collective that a thread is inside of, by name ("all_reduce"), or None.

    A CUDA collective goes on after its call has returned; the flight recorder tells of those.
    """
    frame = sys._current_frames().get(thread)
    found = None
    while frame is not None:
        found = _talking(frame) or found
        frame = frame.f_back
    return found


def _talking(frame: FrameType) -> str | None:
    code = frame.f_code
    talks = any(place in code.co_filename for place in _TALKING)
    return code.co_name if talks and code.co_name not in _PLUMBING else None


def _short(path: str) -> str:
    return os.path.join(*path.split(os.sep)[-2:])


def device_collective_in_progress() -> str | None:
    """The NCCL collective that the device has not finished, by name, or None: its call returned long ago."""
    for entry in reversed(json.loads(flight_record() or "{}").get("entries", [])):
        if entry["profiling_name"].startswith("nccl") and not entry["retired"]:
            return str(entry["profiling_name"])
    return None


def failed_in_a_collective(error: BaseException) -> bool:
    """Whether an exception says that other ranks did not come, rather than that this one did something wrong."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "nccl", "connection closed by"))
