"""How the ranks of a conversation hear the prompt that a person types at one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
import torch.distributed as dist

from megatron.distributed.process_group import device

INTERVAL = 5.0  # [s] between two messages of rank 0 while it waits for input
Typed = list[str | None]
"""What was typed, or nothing yet."""


def broadcast_prompt(ask: Callable[[], str | None], *, limit: float) -> str | None:
    """What rank 0 gets by asking, on every rank. Collective.

    limit [s]: how long a rank may wait for another. A person may take longer, so rank 0 gives signs meanwhile.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ask()
    send = partial(_send, target=device())  # the device of a CUDA process is known to its main thread only
    if dist.get_rank() == 0:
        with _signs(partial(send, []), min(INTERVAL, limit / 4)):
            typed = ask()
        return send([typed])[0]
    while not (received := send([])):
        pass
    return received[0]


def _send(answer: Typed, *, target: torch.device) -> Typed:
    held = [answer]
    dist.broadcast_object_list(held, src=0, device=target)
    return held[0]


@contextmanager
def _signs(send: Callable[[], object], every: float) -> Iterator[None]:
    """Sends every so many seconds while the enclosed work waits for a person."""
    end = threading.Event()

    def beat() -> None:
        with suppress(RuntimeError):  # a rank is gone, which the next prompt will tell
            while not end.wait(every):
                send()

    thread = threading.Thread(target=beat, name="signs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
