"""Runs a function on N ranks over gloo: the one helper for tests of anything distributed.

    def norms(rank: int, world_size: int, scale: float) -> float: ... first, second = run_distributed(norms, 2, 0.5)

Importing torch, DeepSpeed and this package costs seconds a process, so a server process imports them once
(multiprocessing's forkserver) and every rank is a fork of it: a call costs about a second. The function and its
arguments travel by plain pickle, since torch's own pickling shares memory with a process that is about to end. A rank
whose server dies is killed by the kernel, so an interrupted test run leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.launcher.commands.local import KEEP_FREED_MEMORY
from megatron.ranks import free_port

PRELOADED = [
    "tests.cpu_info",
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.cpp_extension",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "megatron.training.trainer",
    "megatron.model.attention.dense",
    "megatron.model.mlp.dense",
    "megatron.objectives.language_model",
    "pytest",
    "transformers.models.auto.modeling_auto",
    "datasets",
]
"""What training, evaluation and the modules of the tests themselves import."""
SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    **KEEP_FREED_MEMORY,
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1"),
}
"""What torch, glibc and the last two libraries read when the server starts: one thread, the allocator as the launcher
sets it, and the network as an evaluation does.
"""
PR_SET_PDEATHSIG = 1  # prctl(2)
OUTPUT_SHOWN = 4000  # [characters] of a rank's own output in the error of a failed call
SECONDS_FOR_OTHER_FAILURES = 0.3


class RankFailedError(Exception):
    """A rank raised, died or hung; the text holds its traceback and the end of what it printed."""


@dataclass
class _Rank:
    rank: int
    process: BaseProcess
    pipe: Connection
    output: Path

    def said(self) -> str:
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return f"--- output of rank {self.rank}:\n{text[-OUTPUT_SHOWN:]}" if text else ""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Calls function(rank, world_size, *args) on every rank and returns the results in rank order.

    function: a module-level function. Each rank finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set,
    torch.distributed initialised through DeepSpeed, one torch thread, and the caller's environment and directory.
    timeout [s]: for the whole call. Raises RankFailedError with the traceback of the rank that raised, or, after the
    timeout, with the stack of each rank. The remaining ranks are killed in both cases.
    """
    work = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = _start(work, world_size, Path(folder), timeout, backend)
        try:
            return [pickle.loads(payload) for payload in _collect(ranks, time.monotonic() + timeout)]
        finally:
            for each in ranks:
                each.process.kill()
                each.process.join()
                each.pipe.close()


def run_cases(cases: Mapping[Any, tuple[Any, ...]], world_size: int, timeout: float = 120.0) -> dict[Any, list[Any]]:
    """Calls several functions one after the other in one world, which saves a second for each.

    cases: name -> the function and its further arguments. Returns name -> results in rank order. The rest is as in
    run_distributed.
    """
    of_ranks = run_distributed(_call_each, world_size, dict(cases), timeout=timeout)
    return {name: [results[name] for results in of_ranks] for name in cases}


def _call_each(rank: int, world_size: int, cases: dict[Any, tuple[Any, ...]]) -> dict[Any, Any]:
    results = {}
    for name, (function, *args) in cases.items():
        try:
            results[name] = function(rank, world_size, *args)
        except Exception as error:
            error.add_note(f"in the case {name}")
            raise
        gc.collect()  # the next one starts with nothing of this one alive
    return results


def _start(work: bytes, world_size: int, folder: Path, timeout: float, backend: str) -> list[_Rank]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environment = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ranks = []
    with patch.dict(os.environ, SERVER_ENVIRONMENT):
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            mine = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            output = folder / f"rank_{rank}.txt"
            process = context.Process(target=_rank_main, args=(sender, work, mine, str(output), timeout, backend))
            process.daemon = True
            process.start()
            sender.close()
            ranks.append(_Rank(rank, process, receiver, output))
    return ranks


def _collect(ranks: list[_Rank], deadline: float) -> list[bytes]:
    """The pickled result of every rank; raises as soon as one fails."""
    results: dict[int, bytes] = {}
    waiting = {each.pipe: each for each in ranks}
    failures: list[str] = []
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if failures:
                break
            standing = "\n".join(each.said() for each in ranks)
            names = ", ".join(str(each.rank) for each in waiting.values())
            raise RankFailedError(f"no answer from rank {names} of {len(ranks)} in time\n{standing}")
        for pipe in ready:
            each = waiting.pop(pipe)  # type: ignore[index]
            succeeded, payload = _answer(each)
            if succeeded:
                results[each.rank] = payload
            else:
                failures.append(f"rank {each.rank} of {len(ranks)} failed:\n{payload.decode()}\n{each.said()}")
                # Another rank may have failed on its own at the same moment; one that now hangs is not waited for.
                deadline = min(deadline, time.monotonic() + SECONDS_FOR_OTHER_FAILURES)
    if failures:
        raise RankFailedError("\n".join(failures))
    return [results[each.rank] for each in ranks]


def _answer(each: _Rank) -> tuple[bool, bytes]:
    try:
        return each.pipe.recv_bytes() == b"done", each.pipe.recv_bytes()
    except EOFError:
        each.process.join(5)
        return False, f"it ended without an answer, exit code {each.process.exitcode}".encode()


def _rank_main(
    pipe: Connection, work: bytes, environment: dict[str, str], output: str, timeout: float, backend: str
) -> None:
    """The life of one rank, in a fork of the preloaded server."""
    gc.freeze()  # what the server loaded is never garbage, and looking through it takes half a second
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.dump_traceback_later(max(0.1, 0.9 * timeout), file=log)
    try:
        answer = (b"done", pickle.dumps(_call(work, backend, Path(output).with_name("store"))))
    except BaseException:
        answer = (b"failed", traceback.format_exc().encode())
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(BrokenPipeError):
        for part in answer:
            pipe.send_bytes(part)
    os._exit(0)  # the interpreter's own ending would wait for gloo's and torch's threads


def _call(work: bytes, backend: str, store: Path) -> Any:
    import deepspeed
    import torch

    from megatron.distributed.init import without_shared_memory

    without_shared_memory()
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed(
        backend,
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
    )
    function, args = pickle.loads(work)
    result = function(rank, world_size, *args)
    if torch.distributed.is_initialized():  # the function may have left the group itself
        torch.distributed.barrier()  # no rank leaves while another still reads from it
    return result
