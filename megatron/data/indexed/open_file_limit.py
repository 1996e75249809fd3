"""How many files a process may hold open: a mapped file counts, and a blend of hundreds of data sets maps thousands."""

from __future__ import annotations

import contextlib
import resource

PAIR = 2  # [files] .bin and .idx


def allow_open_files(more: int) -> None:
    """Raises this process's own limit for so many further files, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    limit = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
