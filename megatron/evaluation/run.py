"""Evaluation of a checkpoint, on lm-eval tasks or as bits per byte of a text: the wiring, in order.

Nothing is fetched from a network unless the environment says so with HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.config import Config
from megatron.engine.engine import Engine
from megatron.errors import ConfigError, RunError
from megatron.evaluation import compression
from megatron.evaluation.progress import Progress
from megatron.inference.run import context_length, with_model
from megatron.log import get_logger
from megatron.parallel.bootstrap import device
from megatron.parallel.topology import Axis, Topology
from megatron.tokenizers.base import Tokenizer


def evaluate(config: Config) -> None:
    """Scores the checkpoint on `eval_tasks`; rank 0 prints lm-eval's table and writes the results file.

    Collective: every rank runs every request, since each forward pass needs all ranks of the model. Raises ConfigError
    when lm-eval is missing or a task is not known, before the model is loaded.
    """
    config = config.for_inference()
    section = config.evaluation
    require_harness(section.eval_tasks)
    from megatron.evaluation.tasks import Tasks

    tasks = Tasks(section.eval_tasks or (), section.eval_include_path, section.eval_num_fewshot)

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        results = _run_tasks(config, tasks, engine, tokenizer, topology.rank)
        if topology.rank == 0:
            _publish(config, results)

    with_model(config, work)


def measure_text(config: Config) -> None:
    """Prints the bits per byte of the text at `eval_text`, beside compressors; `<log_dir>/bits_per_byte.json` has them.

    Collective: the data-parallel replicas of the model share the text out. Raises ConfigError for an unusable text.
    """
    config = config.for_inference()
    section = config.evaluation
    documents = compression.read_documents(section.eval_text)[: section.eval_limit]

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        measured = compression.measure(
            engine,
            tokenizer,
            documents,
            max_length=context_length(config),
            batch_size=batch_size(config),
            share=(topology.data.rank, topology.data.size),
            on_progress=Progress("measuring"),
            add_up=lambda number: _sum_over(topology.data, number),
        )
        if topology.rank == 0:
            _tell_bits(config, measured, documents)

    with_model(config, work)


def require_harness(eval_tasks: Any) -> None:
    """Makes ready to import lm_eval. Raises ConfigError when there is no task to run or no lm-eval to run it."""
    if not eval_tasks:
        raise ConfigError.of("needs the names of tasks", key="eval_tasks", value=eval_tasks, remedy="--eval_tasks TASK")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError.of(
            "evaluation needs the package lm-eval, which is not installed",
            key="eval_tasks",
            value=list(eval_tasks),
            remedy="pip install 'neox[eval]'",
        )
    # Read when the libraries are first imported: no network, and no bars for local files.
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(switch, "1")


def batch_size(config: Config) -> int:
    """Texts in one forward pass [samples]."""
    return config.evaluation.eval_batch_size or config.training.train_micro_batch_size_per_gpu or 1


def _run_tasks(config: Config, tasks: Any, engine: Engine, tokenizer: Tokenizer, rank: int) -> dict[str, Any]:
    from megatron.evaluation.adapter import HarnessModel

    section = config.evaluation
    model = HarnessModel(
        engine,
        tokenizer,
        max_length=context_length(config),
        batch_size=batch_size(config),
        seed=config.training.seed,
    )
    # Error bars are drawn from many resamplings; one rank is enough for those.
    arguments = {"bootstrap_iters": 10000 if rank == 0 else 0} | dict(section.eval_model_args or {})
    results: dict[str, Any] = tasks.run(model, limit=section.eval_limit, **arguments)
    return results


def _publish(config: Config, results: dict[str, Any]) -> None:
    """Prints the table and writes the file."""
    from megatron.evaluation.tasks import results_table

    print(results_table(results), flush=True)
    _write(results_path(config.evaluation.eval_results_prefix), results_record(config, results))


def _tell_bits(config: Config, measured: compression.Measurement, documents: list[str]) -> None:
    others = compression.compressors(documents)
    print(compression.comparison(measured, others, len(documents)), flush=True)
    if config.observe.log_dir is not None:
        record = {**asdict(measured), "bits_per_byte": measured.bits_per_byte, **others}
        _write(Path(config.observe.log_dir) / "bits_per_byte.json", record)


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=4, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError.of(f"cannot write the results ({error.strerror})", where=str(path)) from error
    get_logger(__name__).info("results written to %s", path)


def _sum_over(axis: Axis, number: float) -> float:
    """The sum of a number over the ranks of an axis."""
    if axis.size == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device())
    dist.all_reduce(total, group=axis.group)
    return float(total)


def results_path(prefix: str, now: time.struct_time | None = None) -> Path:
    """`[<prefix>_]eval_results_<date>.json`; the prefix may hold folders."""
    name = time.strftime("eval_results_%m-%d-%Y-%H-%M-%S.json", now or time.localtime())
    return Path(f"{prefix}_{name}" if prefix else name)


def results_record(config: Config, results: dict[str, Any]) -> dict[str, Any]:
    """What the file holds: lm-eval's results without the single documents, and how they came about."""
    record = {name: value for name, value in results.items() if name not in ("samples", "configs")}
    record["config"] = {
        "model": "neox",
        "model_args": config.flat(),
        "batch_size": batch_size(config),
        "device": str(device()),
        "use_cache": None,
        "limit": config.evaluation.eval_limit,
        "num_fewshot": config.evaluation.eval_num_fewshot,
    }
    record["git_hash"] = config.observe.git_hash
    return record
