"""Saving: written beside, made durable, then given its name; `latest` moves last.

A process that dies, a disk that fills up or a node that vanishes at any moment leaves the checkpoints before as they
were. What was half written carries the name global_step<N>.partial and is removed by the next save.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron.checkpoint import files, integrity, layout, rng, slices, weights
from megatron.checkpoint.handles import Checkpointable, together
from megatron.config import Config


@dataclass(frozen=True)
class Counters:
    """How far a run has come.

    iteration: updates made or skipped [steps]. consumed_samples, consumed_tokens: training data used.
    skipped: updates left out, such as those whose gradients overflowed [steps].
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped: int = 0


def save_checkpoint(config: Config, engine: Checkpointable, counters: Counters, *, padded_vocab_size: int) -> Path:
    """Writes <save>/global_step<N> and points `latest` at it; collective. Returns its folder.

    Raises RunError on every rank if any rank cannot write; the checkpoints before stay as they were.
    """
    save = Path(_required(config.checkpoint.save))
    partial = layout.partial_directory(save, counters.iteration)
    final = layout.step_directory(save, counters.iteration)
    is_first = engine.topology.rank == 0
    shards = engine.weights()
    try:
        together(lambda: _make_room(partial) if is_first else None, f"preparing {partial}")
        together(lambda: _write(partial, config, engine, counters, shards, padded_vocab_size), f"writing {partial}")
        together(lambda: _publish(partial, final) if is_first else None, f"completing {final}")
    except Exception:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if is_first:
        _retain(save, config.checkpoint.keep_last_n_checkpoints)
    return final


def _required(save: str | None) -> str:
    assert save is not None, "the caller saves only where `save` is set"
    return save


def _make_room(partial: Path) -> None:
    for stale in partial.parent.glob("global_step*.partial"):
        shutil.rmtree(stale)
    partial.mkdir(parents=True)
    (partial / layout.STATE).mkdir()


def _write(
    partial: Path,
    config: Config,
    engine: Checkpointable,
    counters: Counters,
    shards: dict[str, torch.Tensor],
    padded_vocab_size: int,
) -> None:
    """This rank's files."""
    topology = engine.topology
    if topology.gradient.is_first:
        stored = weights.public_biases(shards, summed=config.model.gpt_j_residual, model_rank=topology.model.rank)
        facts = _public_facts(config, counters, padded_vocab_size)
        path = partial / layout.model_file(topology.replica.rank)
        if engine.pipelined:
            weights.write_layers(partial, stored, topology.model.rank)
            files.write_tensors(path, {"module": None, **facts})
        else:
            weights.write_whole(path, stored, facts)
    if not config.checkpoint.no_save_optim:
        kept = engine.optimizer_slices()
        sizes = {"model_rank": topology.model.rank, "model_size": topology.model.size}
        slices.write(partial, topology.rank, slices=kept, **sizes)
    if not config.checkpoint.no_save_rng:
        files.write_tensors(partial / layout.rng_file(topology.rank), rng.capture(engine.random))
    if topology.rank == 0:
        files.write_json(partial / layout.RUN, _run_facts(config, engine, counters))
        files.write_json(partial / layout.CONFIGS / "resolved.json", json.loads(json.dumps(config.flat(), default=str)))


def _public_facts(config: Config, counters: Counters, padded_vocab_size: int) -> dict[str, Any]:
    """What the public layout's model file says beside the weights."""
    model = config.model
    return {
        "iteration": counters.iteration,
        "global_steps": counters.iteration,
        "global_samples": counters.consumed_samples,
        "skipped_steps": counters.skipped,
        "dp_world_size": config.parallelism.data_parallel_size,
        "mp_world_size": config.parallelism.model_parallel_size,
        "args": {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "max_position_embeddings": model.max_position_embeddings,
            "make_vocab_size_divisible_by": config.tokenizer.make_vocab_size_divisible_by,
            "padded_vocab_size": padded_vocab_size,
            "tokenizer_type": config.tokenizer.tokenizer_type,
            "model_parallel_size": config.parallelism.model_parallel_size,
        },
    }


def _run_facts(config: Config, engine: Checkpointable, counters: Counters) -> dict[str, Any]:
    """Counters, layout and versions, for people and for resuming."""
    topology = engine.topology
    return {
        "counters": asdict(counters),
        "layout": {
            "pipe": topology.pipe.size,
            "data": topology.data.size,
            "context": topology.context.size,
            "model": topology.model.size,
            "pipelined": engine.pipelined,
            "zero_stage": config.deepspeed.zero_stage,
        },
        "precision": config.precision.precision,
        "schedule": config.schedule.model_dump(mode="json"),
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__},
    }


def _publish(partial: Path, final: Path) -> None:
    """Complete on the disk first, named second, `latest` third."""
    integrity.write_manifest(partial)
    for directory in (partial / layout.STATE, partial):
        files.sync_directory(directory)
    replaced = final.with_name(final.name + ".replaced.partial")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    files.sync_directory(final.parent)
    files.replace_text(final.parent / layout.LATEST, final.name)
    if replaced.exists():
        shutil.rmtree(replaced)


def _retain(save: Path, keep: int | None) -> None:
    """Removes the oldest checkpoints beyond the last `keep`."""
    if keep:
        for iteration in layout.iterations(save)[:-keep]:
            shutil.rmtree(layout.step_directory(save, iteration))
