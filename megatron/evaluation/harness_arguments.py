"""Arguments of `lm_eval.evaluate` that a configuration gives: which there are, and the documents that it chooses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lm_eval import evaluate as run_harness

from megatron.errors import ConfigError

_KEY = "eval_model_args"
_PRINTED_ONLY = frozenset({"write_out", "verbosity"})
"""Those that choose lines of its log, which is not shown."""


def check_arguments(arguments: Mapping[str, Any], tasks: Mapping[str, Any], documents: int | None) -> dict[str, Any]:
    """Returns the arguments, the chosen documents of each task in order and once.

    Raises ConfigError for one that lm-eval does not have or that has no effect here.

    Args:
        arguments: Of `lm_eval.evaluate`, by name.
        tasks: Name -> loaded task.
        documents: How many of each task are scored, None for all.
    """
    known = inspect.signature(run_harness).parameters.keys() - {"lm", "task_dict", "limit"}
    for name in arguments:
        if name == "limit":
            _refuse("limit is a key of its own", arguments, f"set eval_limit: {arguments['limit']}")
        if name in _PRINTED_ONLY:
            hint = "log_samples: true writes what lm-eval has of each document"
            _refuse(f"{name} chooses lines of lm-eval's log, which is not shown", arguments, hint)
        if name not in known:
            _refuse(f"lm-eval has no argument {name}", arguments, f"choose from {', '.join(sorted(known))}")
    if arguments.get("samples") is None:
        return dict(arguments)
    if documents is not None:
        _refuse("samples and eval_limit both choose documents", arguments, "leave one of them out")
    return {**arguments, "samples": _chosen(arguments, tasks)}


def _chosen(arguments: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, list[int]]:
    """The numbers of the documents of each task, ascending: lm-eval numbers its records by their order in the list."""
    samples = arguments["samples"]
    if not isinstance(samples, Mapping):
        _refuse("samples is not a table of tasks", arguments, 'write {"<task>": [0, 2, 5]}')
    for name, numbers in samples.items():
        if name not in tasks:
            _refuse(f"samples names {name}, which is not scored", arguments, f"choose from {', '.join(sorted(tasks))}")
        if not isinstance(numbers, list | tuple) or not all(type(number) is int for number in numbers):
            _refuse(f"samples of {name} is not a list of whole numbers", arguments, "documents are numbered from 0")
        if not numbers:
            _refuse(f"samples of {name} is empty", arguments, "leave the task out of eval_tasks")
        count = len(tasks[name].eval_docs)
        outside = [number for number in numbers if not 0 <= number < count]
        if outside:
            _refuse(f"{name} has no document {outside[0]}", arguments, f"its {count} documents are numbered from 0")
    return {name: sorted(set(numbers)) for name, numbers in samples.items()}


def _refuse(what: str, arguments: Mapping[str, Any], hint: str) -> None:
    raise ConfigError.of(what, key=_KEY, value=dict(arguments), hint=hint)
