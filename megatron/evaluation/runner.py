"""Evaluation of a checkpoint, on lm-eval tasks or as bits per byte of a text: the wiring, in order.

Nothing is fetched from a network unless the environment says so with HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.config import Config
from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.process_group import any_rank, device, is_announced
from megatron.engine.engine import Engine
from megatron.engine.vocabulary import vocabulary_size
from megatron.errors import ConfigError, RunError
from megatron.evaluation import bits_per_byte, perplexity
from megatron.evaluation.progress import Progress
from megatron.evaluation.results_file import native, require_writable, write_json, write_results, write_samples
from megatron.evaluation.stop_request import StoppableEngine
from megatron.evaluation.work_split import split_over_replicas
from megatron.extensions_dir import user_cache
from megatron.inference.runner import context_length, own_sampling, with_loaded_model
from megatron.inference.scoring import Pair, Score, require_numbers, score
from megatron.log import get_logger
from megatron.metrics.builder import build_reporter
from megatron.ranks import Ranks
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.round_trip import warn_of

if TYPE_CHECKING:
    from megatron.tokenizers.chat_template import ChatTemplate


_FILES_OF_FOLDERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Names under which `transformers` finds a tokenizer in a folder."""


def evaluate(config: Config) -> None:
    """Scores the checkpoint on `eval_tasks`; rank 0 prints lm-eval's table and writes the results file.

    Collective: copies of the model share the requests out, and the ranks of a copy handle the same ones. Raises
    ConfigError when lm-eval is missing or a task is not known, before the model is loaded.
    """
    config = config.for_inference()
    if Ranks.from_environment().rank == 0:
        require_writable(config.evaluation.eval_results_prefix)
    tasks, chat = _load_tasks(config)

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        results = _run_tasks(config, tasks, _harness_model(config, engine, tokenizer, topology, chat), topology)
        if topology.rank == 0:
            _publish(config, results)
            _report(config, flat_metrics(results), known_iteration(config))

    with_loaded_model(config, work)


def live_evaluation(
    config: Config, engine: Engine, tokenizer: Tokenizer, topology: Topology, *, stop_requested: Callable[[], bool]
) -> Callable[[], dict[str, float] | None] | None:
    """What scores a model in training on `eval_tasks`, as `eval/<task>_<metric>`; None where there are no tasks.

    Collective.

    Args:
        config: The run's configuration.
        engine: The engine that trains.
        tokenizer: The run's tokenizer.
        topology: The device mesh.
        stop_requested: Whether this rank was asked to stop, which gives the scoring up, with None. A model whose scores
            are not numbers and a task whose metrics fail have no metrics but a line that says why; training goes on.
            The tasks are loaded at once, so that a misspelt one is reported before the training starts.
    """
    if not config.evaluation.eval_tasks:
        return None
    tasks, chat = _load_tasks(config)
    # Where parameters are spread over the copies of the model every copy takes part in every forward pass, so requests
    # cannot be shared out.
    spread = config.deepspeed.zero_stage == 3 or config.moe.moe_expert_parallel_size > 1
    replicas = Axis("data") if spread else topology.data
    parallelism = config.parallelism
    full_sequence = not parallelism.sequence_parallel and parallelism.context_parallel_size == 1

    def asked() -> bool:
        return is_announced("stop", stop_requested())

    stoppable = StoppableEngine(engine, asked, any_rank if spread else partial(_any_of_copy, topology))
    model = _harness_model(config, stoppable, tokenizer, topology, chat, replicas=replicas, cached=full_sequence)

    def run() -> dict[str, float] | None:
        from megatron.evaluation.error_bars import one_process

        stoppable.stopped = False
        try:
            with one_process():
                results, why = _run_tasks(config, tasks, model, topology), "a stop was asked for"
        except RunError as error:
            results, why = None, str(error)
        if not any_rank(results is None or stoppable.stopped):
            if topology.rank == 0:
                _write_samples(config, results or {})
            return flat_metrics(results or {})
        if topology.rank == 0:
            get_logger(__name__).warning("the tasks are not scored: %s", why)
        return None if any_rank(stoppable.stopped) else {}

    return run


def _any_of_copy(topology: Topology, holds: bool) -> bool:
    """Whether it holds on any of the ranks that compute one copy of the model together."""
    for axis in (topology.model_parallel, topology.context):
        holds = any_rank(holds, axis.group) if axis.size > 1 else holds
    return holds


def flat_metrics(results: dict[str, Any]) -> dict[str, float]:
    """`eval/<task>_<metric>` -> value, of all tasks; lm-eval's `acc,none` is `acc` here."""
    flat = {}
    for task, metrics in results.get("results", {}).items():
        for name, said in metrics.items():
            value = native(said)
            if isinstance(value, int | float) and name != "sample_len":
                flat[f"eval/{task}_{name.removesuffix(',none').replace(',', '_')}"] = float(value)
    return flat


def measure_text(config: Config) -> None:
    """Prints the bits per byte of the text at `eval_text`, beside compressors; `<log_dir>/bits_per_byte.json` has them.

    Collective: the data-parallel replicas of the model share the text out. Raises ConfigError for an unusable text.
    """
    config = config.for_inference()
    section = config.evaluation
    documents = bits_per_byte.read_documents(section.eval_text)[: section.eval_limit]

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        measured = bits_per_byte.measure(
            engine,
            tokenizer,
            documents,
            max_length=context_length(config),
            batch_size=batch_size(config),
            vocabulary=vocabulary_size(config, tokenizer),
            share=(topology.data.rank, topology.data.size),
            on_progress=Progress("measuring"),
            add_up=lambda number: _sum_over(topology.data, number),
        )
        if topology.rank == 0:
            warn_of(tokenizer)
            _report_bits(config, measured, documents)

    with_loaded_model(config, work)


def measure_perplexity(config: Config) -> None:
    """Prints the perplexity a word of `eval_text` and the cloze accuracy on `eval_cloze`; `<log_dir>/perplexity.json`.

    Collective: the data-parallel replicas of the model share the work out. Raises ConfigError for unusable files.
    """
    config = config.for_inference()
    section = config.evaluation
    if section.eval_text is None and section.eval_cloze is None:
        raise ConfigError.of("there is nothing to measure", key="eval_text", hint="--eval-text or --eval-cloze FILE")
    text = "\n".join(bits_per_byte.read_documents(section.eval_text)) if section.eval_text else None
    cloze = bits_per_byte.read_documents(section.eval_cloze)[: section.eval_limit] if section.eval_cloze else None

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        length = context_length(config)

        def scorer(pairs: list[Pair]) -> list[Score]:
            scored = partial(
                score,
                engine,
                max_length=length,
                batch_size=batch_size(config),
                padding=tokenizer.eod,
                vocabulary=vocabulary_size(config, tokenizer),
            )
            found = split_over_replicas(pairs, scored, topology.data, size=lambda pair: len(pair.inputs()))
            require_numbers(found, "pieces of text")
            return found

        record: dict[str, Any] = {}
        if text is not None:
            found = perplexity.word_perplexity(text, tokenizer, scorer, max_length=length, overlap=section.eval_overlap)
            record = {**asdict(found), "perplexity_a_token": found.a_token, "perplexity_a_word": found.a_word}
        if cloze is not None:
            record["cloze_texts"] = len(cloze)
            record["cloze_accuracy"] = perplexity.cloze_accuracy(cloze, tokenizer, scorer)
        if topology.rank == 0:
            warn_of(tokenizer)
            print("\n".join(f"{name:<20} {value:,.6g}" for name, value in record.items()), flush=True)
            if config.observe.log_dir is not None:
                write_json(Path(config.observe.log_dir) / "perplexity.json", record)

    with_loaded_model(config, work)


def require_harness(eval_tasks: Any) -> None:
    """Makes ready to import lm_eval. Raises ConfigError when there is no task to run or no lm-eval to run it."""
    if not eval_tasks:
        raise ConfigError.of("needs the names of tasks", key="eval_tasks", value=eval_tasks, hint="--eval_tasks TASK")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError.of(
            "evaluation needs the package lm-eval, which is not installed",
            key="eval_tasks",
            value=list(eval_tasks),
            hint="pip install 'neox[eval]'",
        )
    # Read when the libraries are first imported: no network, and no bars for local files.
    os.environ.setdefault("LM_HARNESS_CACHE_PATH", str(user_cache(os.environ) / "neox" / "requests"))
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(switch, "1")


def batch_size(config: Config) -> int:
    """Texts in one forward pass [samples]."""
    return config.evaluation.eval_batch_size or config.training.train_micro_batch_size_per_gpu or 1


def _load_tasks(config: Config) -> tuple[Any, ChatTemplate | None]:
    """The tasks that the configuration names, and the chat template if it asks for that."""
    section = config.evaluation
    require_harness(section.eval_tasks)
    from megatron.evaluation.tasks import Tasks

    chat = None
    if section.eval_chat_template:
        named = config.tokenizer
        from megatron.tokenizers.chat_template import ChatTemplate

        chat = ChatTemplate.of_tokenizer(named.tokenizer_type, named.vocab_file, key="eval_chat_template")
    tokenizer = tokenizer_for_tasks(config.tokenizer.vocab_file)
    tasks = Tasks(
        section.eval_tasks or (),
        section.eval_include_path,
        section.eval_num_fewshot,
        own_sampling(config),
        {**({} if tokenizer is None else {"tokenizer": tokenizer}), **(section.eval_metadata or {})},
    )
    tasks.check(section.eval_limit, section.eval_model_args or {})
    return tasks, chat


def tokenizer_for_tasks(vocab_file: str | None) -> str | None:
    """What tasks that count tokens by themselves (RULER) give to `transformers`: a folder, or a public model's name.

    None where `transformers` does not read the file.
    """
    if vocab_file is None or not Path(vocab_file).is_file():
        return vocab_file
    path = Path(vocab_file)
    return str(path.parent) if path.name in _FILES_OF_FOLDERS else None


def _harness_model(
    config: Config,
    engine: Engine,
    tokenizer: Tokenizer,
    topology: Topology,
    chat: ChatTemplate | None,
    *,
    replicas: Axis | None = None,
    cached: bool = True,
) -> Any:
    from megatron.evaluation.lm_eval_model import HarnessModel

    words = f"{Path(config.tokenizer.vocab_file or '').name}-{tokenizer.vocab_size}"
    if chat is not None:
        words += f"-{chat.digest}"
    # Each rank keeps the requests it builds, so that ranks never take old ones and new ones together.
    suffix = "" if topology.world_size == 1 else f"-{topology.rank}of{topology.world_size}"
    return HarnessModel(
        engine,
        tokenizer,
        max_length=context_length(config),
        batch_size=batch_size(config),
        seed=config.training.seed,
        replicas=replicas or topology.data,
        cached=cached,
        chat=chat,
        name=f"{config.tokenizer.tokenizer_type}-{words}{suffix}",
        end_ids=config.generation.eos_token_ids or (),
        vocabulary=vocabulary_size(config, tokenizer),
        sampling=own_sampling(config),
    )


def _run_tasks(config: Config, tasks: Any, model: Any, topology: Topology) -> dict[str, Any]:
    section = config.evaluation
    # Error bars are drawn from many resamplings: one rank is enough for those.
    arguments = {
        "bootstrap_iters": 10000 if topology.rank == 0 else 0,
        "apply_chat_template": section.eval_chat_template,
        "fewshot_as_multiturn": section.eval_chat_template,  # the default of lm-eval's command line
        "cache_requests": section.eval_cache_requests,
    }
    own = dict(section.eval_model_args or {})
    results: dict[str, Any] = tasks.run(model, section.eval_limit, **(arguments | own))
    return results


def known_iteration(config: Config) -> int:
    """The iteration of the checkpoint that `load` names;

    0 where neither `iteration` nor its `latest` file gives one.
    """
    if config.checkpoint.iteration is not None:
        return config.checkpoint.iteration
    latest = Path(config.checkpoint.load or "") / "latest"
    digits = latest.read_text(encoding="utf-8").strip().removeprefix("global_step") if latest.is_file() else ""
    return int(digits) if digits.isdecimal() else 0


def _report(config: Config, metrics: dict[str, float], iteration: int) -> None:
    """Hands the metrics to the sinks of the run directory."""
    if config.observe.log_dir is None:
        return
    reporter = build_reporter(config.observe, 0, start_iteration=iteration)
    try:
        reporter.evaluation(iteration, "eval", metrics)
    finally:
        reporter.close()


def _publish(config: Config, results: dict[str, Any]) -> None:
    """Prints the table and writes the files."""
    from megatron.evaluation.tasks import results_table

    section = config.evaluation
    print(results_table(results), flush=True)
    write_results(section.eval_results_prefix, results_record(config, results))
    _write_samples(config, results)


def _write_samples(config: Config, results: Mapping[str, Any]) -> None:
    """Writes what lm-eval has of each document, if that is asked for."""
    section = config.evaluation
    if (section.eval_model_args or {}).get("log_samples"):
        write_samples(section.eval_results_prefix, results)


def _report_bits(config: Config, measured: bits_per_byte.BitsPerByte, documents: list[str]) -> None:
    others = bits_per_byte.compressors(documents)
    print(bits_per_byte.comparison(measured, others, len(documents)), flush=True)
    if config.observe.log_dir is not None:
        record = {**asdict(measured), "bits_per_byte": measured.bits_per_byte, **others}
        write_json(Path(config.observe.log_dir) / "bits_per_byte.json", record)


def _sum_over(axis: Axis, number: float) -> float:
    """The sum of a number over the ranks of an axis."""
    if axis.size == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device())
    dist.all_reduce(total, group=axis.group)
    return float(total)


def results_record(config: Config, results: dict[str, Any]) -> dict[str, Any]:
    """What the file holds: lm-eval's results without the single documents, and how they came about."""
    record = {name: value for name, value in results.items() if name not in ("samples", "configs")}
    record["config"] = {
        "model": "neox",
        "model_args": config.without_secrets().flat(),
        "batch_size": batch_size(config),
        "device": str(device()),
        "use_cache": None,
        "limit": config.evaluation.eval_limit,
        "num_fewshot": config.evaluation.eval_num_fewshot,
    }
    record["git_hash"] = config.observe.git_hash
    return record
