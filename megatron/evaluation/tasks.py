"""lm-eval's tasks, its runner and its table, as a class and a function.

Only this file, error_bars.py, harness_arguments.py and lm_eval_model.py import lm_eval (0.4.13:
lm_eval/tasks/manager.py, lm_eval/evaluator.py).
"""

from __future__ import annotations

import difflib
import importlib.machinery
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval import evaluate as run_harness
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry
from lm_eval.utils import make_table

from megatron.errors import ConfigError, RunError
from megatron.evaluation.arguments import read_arguments
from megatron.evaluation.error_bars import infinite_perplexities
from megatron.evaluation.harness_arguments import check_arguments
from megatron.evaluation.request_cache import name_requests_by_content
from megatron.evaluation.seeds import FEWSHOT_SEED, fixed_seeds
from megatron.inference.sampling import Sampling
from megatron.log import get_logger


class Tasks:
    """Loaded tasks of lm-eval, and what they give when a model is run on them."""

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | None = None,
        fewshot: int | None = None,
        sampling: Sampling | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Loads tasks. Raises ConfigError for an unknown name and for generation arguments that cannot be followed.

        Raises RunError when a task's data cannot be had, and for any error of a task's own code.

        Args:
            names: Names, shell wildcards or paths of task files.
            include_path: Folder of further tasks.
            fewshot: Worked examples before each question, for tasks that do not fix the number at 0.
            sampling: The model's own settings, for what tasks leave out.
            metadata: What tasks that make their own data are given, such as `tokenizer` and `max_seq_lengths`.
        """
        manager, found = _find(names, include_path, dict(metadata or {}))
        with _own_evaluate_out_of_the_way(), _quiet(), fixed_seeds():  # some tasks shuffle choices as they load
            try:
                self._loaded = manager.load(_once(manager, found, names))
            except Exception as error:
                raise _loading_failed(error, names) from error
        for name, task in self._loaded["tasks"].items():
            if task.get_config("output_type") == "generate_until":
                read_arguments(task.get_config("generation_kwargs") or {}, name, own=sampling)
            if fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=fewshot)
            elif fewshot:
                message = "task %s fixes its worked examples at 0; eval_num_fewshot = %d is for other tasks"
                get_logger(__name__).warning(message, name, fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            name_requests_by_content(task)

    def check(self, documents: int | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as `run` hands them on. Raises ConfigError for one that cannot be followed.

        documents: of each task, None for all.
        """
        return check_arguments(arguments, self._loaded["tasks"], documents)

    def run(self, model: LM, documents: int | None = None, /, **arguments: Any) -> dict[str, Any]:
        """The results as lm-eval gives them, per-document samples included.

        documents: of each task, None for all. arguments: further ones of `lm_eval.evaluate`. Raises ConfigError for one
        that it does not have or that has no effect here, and RunError where what a task does with the answers fails.
        """
        arguments = self.check(documents, arguments)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)  # else each run goes on where the last one's draws ended
        with _own_evaluate_out_of_the_way(), _quiet(), fixed_seeds(), infinite_perplexities():
            try:
                results = run_harness(lm=model, task_dict=self._loaded, limit=documents, **arguments)
            except Exception as error:
                failed = None if isinstance(error, ConfigError | RunError) else _failed_task(error, model)
                if failed is None:
                    raise
                built = any(
                    frame.f_code.co_name == "build_all_requests" for frame, _ in traceback.walk_tb(error.__traceback__)
                )
                step = (
                    f"prompts of the task {failed} cannot be made"
                    if built
                    else f"metrics of the task {failed} cannot be computed"
                )
                what = f"the {step}: {type(error).__name__}: {error}"
                hint = "correct the task's own functions and metrics, or leave it out"
                raise RunError.of(what, key="eval_tasks", value=failed, hint=hint) from error
        return dict(results or {})  # never None: for lm-eval every rank is a rank 0


def _loading_failed(error: Exception, names: Sequence[str]) -> RunError:
    """What to say where tasks cannot be loaded: which one, and why."""
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    busy = [variables["entry"].name for variables in frames if isinstance(variables.get("entry"), Entry)]
    said = str(error).strip()
    if isinstance(error, OSError | ValueError) and said.startswith("Duplicate task"):
        hint = "score the two in evaluations of their own"
    elif isinstance(error, ImportError):
        hint = "install what the task imports; the README of the task in lm-eval names its extra"
    elif isinstance(error, OSError):  # data sets raise their own kinds of it
        hint = (
            "evaluation is offline: only local files and what is in the Hugging Face cache are found; "
            "set HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 to fetch what is missing"
        )
    else:
        hint = (
            "a task that makes its own data takes settings from eval_metadata, such as tokenizer and max_seq_lengths; "
            "evaluation is offline unless HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 are set"
        )
    kind = "" if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: "
    what = f"the task {busy[-1]}" if busy else "the tasks"
    return RunError.of(
        f"cannot load {what}: {kind}{said}".removesuffix(": "),
        key="eval_tasks",
        value=busy[-1] if busy else list(names),
        hint=hint,
    )


def _failed_task(error: Exception, model: LM) -> str | None:
    """The task that lm-eval was busy with when it failed; None where the model was, whose errors are its own."""
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(variables.get("self") is model for variables in frames):
        return None
    names = [variables["task_name"] for variables in frames if isinstance(variables.get("task_name"), str)]
    return names[-1] if names else None


def results_table(results: dict[str, Any]) -> str:
    """The table that lm-eval prints, and below it the one of the groups, if there are any."""
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(str(table).rstrip("\n") for table in tables)


def _find(names: Sequence[str], include_path: str | None, metadata: dict[str, Any]) -> tuple[TaskManager, list[str]]:
    """A task manager that knows all the names, and the names with wildcards resolved.

    lm-eval's own 14,000 tasks take seconds to list, so they are left out when the user's folder has all the names.

    Args:
        names: As the user wrote them.
        include_path: Folder of further tasks.
        metadata: For all tasks.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError.of("there is no such folder", key="eval_include_path", value=include_path)
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)
        found = {name: _matches(manager, name) for name in names}
        if all(found.values()):
            return manager, [match for matches in found.values() for match in matches]
    manager = TaskManager(include_path=include_path, metadata=metadata)
    found = {name: _matches(manager, name) for name in names}
    ConfigError.raise_any(
        issue for name, matches in found.items() if not matches for issue in _unknown(manager, name).issues
    )
    return manager, list(dict.fromkeys(match for matches in found.values() for match in matches))


def _once(manager: TaskManager, names: Sequence[str], given: Sequence[str]) -> list[str]:
    """The names without the members of a group that is named as well, as with wildcards; tags as their tasks.

    lm-eval refuses a task that is asked for twice, as of two groups of which none is a member of the other. Of these a
    wildcard takes the one that holds more, and a line names the other.

    Args:
        manager: Knows all names.
        names: Those to load.
        given: As the user wrote them, wildcards included.
    """
    single = list(dict.fromkeys(each for name in names for each in _tagged(manager, name)))
    held = {name: _tasks_of(manager, name) for name in single}
    groups = sorted((name for name in single if name in manager.all_groups), key=lambda name: -len(held[name]))
    chosen: list[str] = []
    for name in groups:
        if any(name in _groups_of(manager, other) for other in groups):
            continue
        fuller = next((other for other in chosen if held[name] <= held[other]), None)
        if fuller is None or name in given:
            chosen.append(name)
        else:
            message = "the group %s is left out: the group %s has all its tasks; name it to score it by itself"
            get_logger(__name__).warning(message, name, fuller)
    inside = {task for name in chosen for task in held[name]}
    return [name for name in single if name in chosen or (name not in groups and not held[name] <= inside)]


def _tagged(manager: TaskManager, name: str) -> list[str]:
    """The tasks of a tag; of anything else its name."""
    if name not in manager.all_tags:
        return [name]
    return sorted(task for task in manager.all_subtasks if name in manager._index[task].tags)


def _tasks_of(manager: TaskManager, child: str | Mapping[str, Any]) -> set[str]:
    """Names of the tasks of a task, a tag or a group, or of what a group lists.

    Args:
        manager: Knows all names.
        child: A name, or a task or a group as a task file writes it.
    """
    if isinstance(child, str):
        if child not in manager.all_groups:
            return set(_tagged(manager, child))
        child = manager._index[child].cfg or {}
    listed = child.get("task")
    if isinstance(listed, list):
        return {task for each in listed for task in _tasks_of(manager, each)}
    return _tasks_of(manager, listed) if isinstance(listed, str) else set()


def _groups_of(manager: TaskManager, child: str | Mapping[str, Any]) -> set[str]:
    """Names of the groups inside a group, or inside what a group lists, at any depth.

    Args:
        manager: Knows all names.
        child: A name, or a task or a group as a task file writes it.
    """
    if isinstance(child, str):
        child = (manager._index[child].cfg or {}) if child in manager.all_groups else {}
    listed = child.get("task")
    inside: set[str] = set()
    for each in listed if isinstance(listed, list) else ():
        name = each if isinstance(each, str) else each.get("task")
        if isinstance(name, str) and name in manager.all_groups:
            inside.add(name)
        inside |= _groups_of(manager, each)
    return inside


def _matches(manager: TaskManager, name: str) -> list[str]:
    if Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        return [name]
    return sorted(manager.match_tasks([name]))


def _unknown(manager: TaskManager, name: str) -> ConfigError:
    if "," in name:
        hint = "give several names as several words, or as a list in the configuration"
        return ConfigError.of("lm-eval has no task of this name", key="eval_tasks", value=name, hint=hint)
    close = difflib.get_close_matches(name, manager.all_tasks, n=1)
    hint = f"did you mean {close[0]}?" if close else "eval_include_path names a folder of tasks of your own"
    return ConfigError.of("lm-eval has no task of this name", key="eval_tasks", value=name, hint=hint)


class _EvaluatePackage:
    """Finds the package `evaluate` that some tasks import, past the script of that name beside deepy.py."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "evaluate":
            return None
        elsewhere = [entry for entry in sys.path if not _is_our_checkout(Path(entry or "."))]
        return importlib.machinery.PathFinder.find_spec(name, elsewhere, target)


def _is_our_checkout(folder: Path) -> bool:
    return (folder / "evaluate.py").is_file() and (folder / "deepy.py").is_file()


@contextmanager
def _own_evaluate_out_of_the_way() -> Iterator[None]:
    """`import evaluate` means the package, while lm-eval and the code of its tasks run."""
    finder: Any = _EvaluatePackage
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval says only what went wrong."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        yield
    finally:
        harness.setLevel(level)
