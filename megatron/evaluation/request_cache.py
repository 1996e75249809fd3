"""Names of cached requests that change with what the requests are built from.

lm-eval names the cached requests of a task by the task's name, its number of few-shot examples and the tokenizer
(0.4.13: lm_eval/api/task.py, build_all_requests). A task whose file, functions or documents changed, or of which
other documents are chosen, keeps that name and would be scored with its old requests.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.evaluation.seeds import fixed_seeds


def name_requests_by_content(task: Any) -> None:
    """Makes a digest of a task's content part of the name that its cached requests have."""
    build: Callable[..., None] = task.build_all_requests

    def build_named(*, tokenizer_name: str = "", cache_requests: bool = False, **arguments: Any) -> None:
        if cache_requests:
            with fixed_seeds():  # documents may be shuffled whenever they are read
                tokenizer_name = f"{tokenizer_name}-{task_digest(task, arguments.get('samples'))}"
        build(tokenizer_name=tokenizer_name, cache_requests=cache_requests, **arguments)

    task.build_all_requests = build_named


def task_digest(task: Any, samples: Sequence[int] | None = None) -> str:
    """A hash of a task's settings, of the source files of its functions, of its documents, and which are chosen."""
    found = hashlib.blake2b(digest_size=8)
    if samples is not None:
        found.update(_as_json(list(samples)))
    found.update(_as_json([task.config.to_dict(keep_callable=True), type(task)]))
    for document in task.eval_docs:
        found.update(_as_json(document))
    if task.config.num_fewshot:
        for document in task.fewshot_docs() or ():
            found.update(_as_json(document))
    return found.hexdigest()


def _as_json(value: Any) -> bytes:
    try:
        return json.dumps(value, default=_described).encode() + b"\n"
    except TypeError:  # a key that JSON cannot hold
        return repr(value).encode() + b"\n"


def _described(value: Any) -> Any:
    """What JSON cannot hold. Other objects are named as Python names them, at worst by their address: never reused."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if callable(value):
        return [getattr(value, "__qualname__", repr(value)), _source_of(value)]
    return repr(value)


def _source_of(function: Any) -> str:
    """A hash of the file that defines a function or class; empty for what is built into Python."""
    try:
        path = inspect.getsourcefile(function)
    except TypeError:
        return ""
    return hashlib.blake2b(Path(path).read_bytes()).hexdigest() if path else ""
