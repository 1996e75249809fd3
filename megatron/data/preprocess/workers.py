"""Work on blocks in several processes, in order and with bounded memory.

Each process is started afresh, gets the encoder once, and then takes blocks through a pipe of its own: mostly places in
files, which it reads itself. Token ids come back as the raw bytes of their arrays. When this process ends, however it
ends, the pipes close and the workers leave.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np

from megatron.data.preprocess.encode import EncodedBlock, EncodedText, Encoder
from megatron.data.preprocess.reader import TextBlock
from megatron.errors import RunError

WAITING = 2  # blocks for each worker that are read ahead or not yet taken
WAITING_BYTES = 64 << 20  # or so much of them, where there is a very long document
_HINT = "a negative code is a signal; with -9 the machine probably ran out of memory: use fewer workers"


def encode_blocks(encoder: Encoder, blocks: Iterable[TextBlock], workers: int) -> Generator[EncodedBlock, None, None]:
    """What each block becomes, in the order of the blocks, whatever the number of workers; 1 works in this process.

    Raises RunError when a worker dies, and whatever a worker raises.
    """
    if workers == 1:
        yield from map(encoder.encode, blocks)
        return
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(_Worker(encoder)))
        threads = ThreadPoolExecutor(workers, thread_name_prefix="preprocess")
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)

        def work(block: TextBlock) -> EncodedBlock:
            worker = idle.get()
            try:
                return worker.encode(block)
            finally:
                idle.put(worker)  # a dead one too: whoever waits for a worker must get one, or never ends

        pending: deque[tuple[Future[EncodedBlock], int]] = deque()
        for block in blocks:
            pending.append((threads.submit(work, block), block.length))
            while len(pending) > WAITING * workers or sum(length for _, length in pending) > WAITING_BYTES:
                yield pending.popleft()[0].result()
        while pending:
            yield pending.popleft()[0].result()


class WorkerKilled(RunError):
    """A signal from outside ended a worker process; the work can be resumed."""


class _Worker:
    """One process and this side of its pipe."""

    def __init__(self, encoder: Encoder) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve, args=(other, encoder), daemon=True)
        try:
            self._process.start()
        except OSError as error:  # it died before it had read what to do, or could not be started
            raise RunError.of(f"a worker process cannot be started ({error})", hint=_HINT) from error
        other.close()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def encode(self, block: TextBlock) -> EncodedBlock:
        """The block's result, or what the worker raised."""
        try:
            self._pipe.send(block)
            answer = _receive(self._pipe)
        except (EOFError, OSError) as error:  # OSError: also in the middle of an answer
            self._process.join(5)
            code = self._process.exitcode
            kind = WorkerKilled if code is not None and code < 0 else RunError
            raise kind.of(
                f"a worker process died (exit code {code})",
                location=f"{block.name}, from byte {block.start}",
                hint=f"{_HINT}; --resume goes on from there" if kind is WorkerKilled else _HINT,
            ) from error
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Connection, encoder: Encoder) -> None:
    """The life of a worker: blocks in, results or exceptions out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work and the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process for each core already
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            block = pipe.recv()
            try:
                answer: EncodedBlock | BaseException = encoder.encode(block)
            except Exception as error:  # noqa: BLE001  the parent raises it
                answer = error
            _send(pipe, answer)


def _send(pipe: Connection, answer: EncodedBlock | BaseException) -> None:
    """The counts, then the bytes of each array."""
    if isinstance(answer, BaseException):
        pipe.send(answer)
        return
    arrays = [array for text in answer.texts for array in (text.tokens, text.sizes, text.items) if array is not None]
    described = [(text.tokens.dtype.str, text.text_bytes, text.items is not None) for text in answer.texts]
    pipe.send((replace(answer, texts=()), described))
    for array in arrays:
        pipe.send_bytes(array.data.cast("B") if len(array) else b"")


def _receive(pipe: Connection) -> EncodedBlock | BaseException:
    answer = pipe.recv()
    if isinstance(answer, BaseException):
        return answer
    block, described = answer
    texts = []
    for dtype, text_bytes, has_items in described:
        tokens, sizes = np.frombuffer(pipe.recv_bytes(), dtype), np.frombuffer(pipe.recv_bytes(), np.int64)
        items = np.frombuffer(pipe.recv_bytes(), np.int64) if has_items else None
        texts.append(EncodedText(tokens, sizes, text_bytes, items))
    return replace(block, texts=tuple(texts))
