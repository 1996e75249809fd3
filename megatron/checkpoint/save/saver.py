"""Saving: written beside, made durable, then given its name; `latest` moves last.

A process that dies, a disk that fills up or a node that vanishes at any moment leaves the checkpoints before as they
were. What was half written carries the name global_step<N>.partial and is removed by the next save.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron.checkpoint.format import integrity, layout, optimizer_shards, rng, weight_shards
from megatron.checkpoint.format.files import Written
from megatron.checkpoint.format.history import History
from megatron.checkpoint.format.logits_check import answers
from megatron.checkpoint.format.metadata import public_facts
from megatron.checkpoint.load.lr_schedule_check import schedule_facts
from megatron.checkpoint.load.mup_check import parametrisation_facts
from megatron.checkpoint.load.run_inputs_check import RunInputs
from megatron.checkpoint.remote.host_copy import Item, Sharing, by_looking, one_folder, spread
from megatron.checkpoint.remote.s3_sync import open_mirror
from megatron.checkpoint.save.async_writer import BackgroundWriter
from megatron.checkpoint.save.commit import make_room, publish, require_shared, retain
from megatron.checkpoint.save.folder_programs import FolderPrograms
from megatron.checkpoint.save.protocol import Checkpointable, run_with_heartbeat, together
from megatron.checkpoint.save.snapshot import Snapshot
from megatron.config import Config, serialize
from megatron.config.validation.unknown_values import require
from megatron.distributed.process_group import all_gather_items
from megatron.errors import ConfigError


@dataclass(frozen=True)
class Counters:
    """How far a run has come."""

    iteration: int = 0
    """Updates made or skipped [steps]."""
    consumed_samples: int = 0
    """Training data used."""
    consumed_tokens: int = 0
    """Training data used."""
    skipped: int = 0
    """Updates left out, such as those whose gradients overflowed [steps]."""


class Saver:
    """Writes the checkpoints of a run, one after another; all methods are collective but `check`.

    Where hosts share no files (`use_shared_fs: false`) each gets the full checkpoint. The constructor raises RunError
    where the save folder is not shared and should be, or the bucket of `s3_path` refuses, ConfigError where a package
    for it is missing or `checkpoint_async` cannot be.

    Args:
        config: Configuration of the run.
        engine: Holds the weights and the optimizer state.
        padded_vocab_size: Rows of the embedding.
        loaded: Checkpoint that the run started from, which is never removed.
        continues: Whether iterations count from that checkpoint's.
        inputs: Files that the run reads.
        programs: Programs that run for some checkpoints.
    """

    def __init__(
        self,
        config: Config,
        engine: Checkpointable,
        *,
        padded_vocab_size: int,
        loaded: Path | None = None,
        continues: bool = False,
        inputs: RunInputs | None = None,
        programs: FolderPrograms | None = None,
    ) -> None:
        assert config.checkpoint.save is not None, "the caller saves only where `save` is set"
        self.config = config
        self.engine = engine
        self.padded_vocab_size = padded_vocab_size
        self.save_folder = Path(config.checkpoint.save)
        self.loaded = loaded
        self.inputs = inputs or RunInputs()
        self._programs = programs
        topology = engine.topology
        patience = float(config.launch.collective_timeout)
        self._writer = BackgroundWriter(topology.rank, topology.world_size, patience)
        if config.data.use_shared_fs:
            require_shared(self.save_folder, topology.rank)
        self._sharing = one_folder() if config.data.use_shared_fs else by_looking(self.save_folder)
        _refuse_in_background(config, self._sharing)
        self._mirror = open_mirror(config.checkpoint, topology.rank)
        self._newest: Path | None = None
        self._others = _later(self.save_folder, loaded) if loaded is not None and continues else set[int]()
        self._history = History(loaded if continues else None) if topology.rank == 0 else None

    def save(self, counters: Counters) -> Path:
        """Writes <save>/global_step<N> and points `latest` at it; returns its folder.

        With `checkpoint_async` it returns when everything is copied to the host's memory, and a thread writes. Raises
        RunError on every rank if any rank cannot write; the checkpoints before stay as they were.
        """
        self._settle()
        beside = layout.partial_directory(self.save_folder, counters.iteration)
        final = layout.step_directory(self.save_folder, counters.iteration)
        with self.engine.saved_weights():
            return self._save(counters, beside, final)

    def _save(self, counters: Counters, beside: Path, final: Path) -> Path:
        leads = self._sharing.leads
        snapshot = take_snapshot(self.config, self.engine, counters, self.padded_vocab_size, self.inputs, self._history)
        if self.config.checkpoint.checkpoint_async:
            snapshot = snapshot.held()
            together(lambda: make_room(beside) if leads else None, f"preparing {beside}")
            self._writer.start(beside, snapshot, lambda written: self._complete(beside, final, written))
            return final
        written: list[Written] = []
        try:
            together(lambda: make_room(beside) if leads else None, f"preparing {beside}")
            together(lambda: written.extend(snapshot.write(beside)), f"writing {beside}")
            everyone = self._everywhere(beside, written)
            together(lambda: self._complete(beside, final, everyone) if leads else None, f"completing {final}")
        except Exception:
            if leads:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        return final

    def check(self) -> None:
        """Raises RunError if a save in flight has failed on this rank; does not wait."""
        self._writer.check()
        if self._programs is not None:
            self._programs.poll()

    def finish(self) -> None:
        """Returns when everything is written, and copied to `s3_path`. RunError on every rank if it failed on any."""
        self._settle()
        if self.config.checkpoint.s3_path is not None:
            run_with_heartbeat(self._finish_copies, f"copying to {self.config.checkpoint.s3_path}")
        if self.config.checkpoint.save_hf_every is not None:
            run_with_heartbeat(self._finish_programs, "writing the folders of save_hf_every")

    def abandon(self) -> None:
        """Waits some seconds for a save in flight, after an error in the training; raises nothing."""
        self._writer.abandon()

    def _settle(self) -> None:
        if self.config.checkpoint.checkpoint_async:
            run_with_heartbeat(self._writer.wait, "the save in flight")

    def _everywhere(self, beside: Path, written: Sequence[Written]) -> list[Written]:
        """What all ranks have written, once it is in the folder of every host."""
        sharing = self._sharing
        mine = [(str(each.path.relative_to(beside)), each.size, each.sha256, sharing.rank) for each in written]
        everyone = all_gather_items(mine)
        if len(sharing.groups) > 1:
            items = [Item(name, size, owner) for name, size, _, owner in everyone]
            spread(items, beside, beside, lambda item: sharing.leads and item.owner not in sharing.members)
        return [Written(beside / name, size, sha256) for name, size, sha256, _ in everyone]

    def _complete(self, beside: Path, final: Path, written: Sequence[Written]) -> None:
        publish(beside, final, written)
        if self._mirror is not None:
            self._mirror.send(final)
        if self._programs is not None:
            self._programs.send(final)
        self._retain(final)

    def _finish_copies(self) -> None:
        """Waits for the copies; then the folders may go that had to wait for them."""
        if self._mirror is None:
            return
        self._mirror.finish()
        if self._newest is not None:
            self._retain(self._newest)

    def _finish_programs(self) -> None:
        if self._programs is not None and self._sharing.leads:
            self._programs.finish()
            if self._newest is not None:
                self._retain(self._newest)

    def _retain(self, final: Path) -> None:
        self._newest = final
        newest = layout.iteration_of(final)
        assert newest is not None, "the folder was named after an iteration"
        self._others.discard(newest)
        keep = self.config.checkpoint.keep_last_n_checkpoints
        pending = [
            *(self._mirror.pending() if self._mirror else ()),
            *(self._programs.pending() if self._programs else ()),
        ]
        retain(
            self.save_folder,
            keep,
            newest=newest,
            loaded=self.loaded,
            pending=pending,
            spared={*(self.config.checkpoint.extra_save_iters or ()), *self._others},
        )


def _later(save: Path, loaded: Path) -> set[int]:
    """Returns the iterations in the folder that come after the checkpoint of it that a run goes on from.

    They are those of a run that went on before, which stay until one of the same iteration takes their place.
    """
    number = layout.iteration_of(loaded)
    if number is None or not layout.same_folder(loaded.parent, save):
        return set()
    return {each for each in layout.iterations(save) if each > number}


def _refuse_in_background(config: Config, sharing: Sharing) -> None:
    """ConfigError where a thread would have to send what it has written to other hosts."""
    if config.checkpoint.checkpoint_async and len(sharing.groups) > 1:
        raise ConfigError.of(
            "the hosts share no folder, and what is saved in the background cannot be sent to the others meanwhile",
            key="checkpoint_async",
            value=True,
            hint="set it to false, or save to a file system that all hosts share and set use_shared_fs: true",
        )


def take_snapshot(
    config: Config,
    engine: Checkpointable,
    counters: Counters,
    padded_vocab_size: int,
    inputs: RunInputs,
    history: History | None = None,
) -> Snapshot:
    """Copies the state that this rank has to write; collective.

    Args:
        config: Configuration of the run.
        engine: Holds the weights and the optimizer state.
        counters: Steps and samples so far.
        padded_vocab_size: Rows of the embedding.
        inputs: Files that the run reads.
        history: The checkpoints of the run so far, on rank 0.
    """
    snapshot = Snapshot()
    topology = engine.topology
    shards = engine.weights()
    if topology.dp_cp.is_first:
        _add_weights(snapshot, config, engine, counters, shards, padded_vocab_size)
    if not config.checkpoint.no_save_optim:
        slices = engine.optimizer_shards()
        facts = optimizer_shards.index(slices, model_rank=topology.model.rank, model_size=topology.model.size)
        snapshot.tensors[layout.slice_file(topology.rank)] = lambda: optimizer_shards.values(slices)
        snapshot.texts[layout.slice_index(topology.rank)] = json.dumps(facts)
    if not config.checkpoint.no_save_rng:
        state = rng.capture(engine.random)
        snapshot.tensors[layout.rng_file(topology.rank)] = lambda: state
    if config.checkpoint.checkpoint_validation_with_forward_pass:
        said = answers(
            engine,
            length=require(config.model.text_length),
            vocabulary=padded_vocab_size,
            precision=require(config.precision.precision),
        )
        if topology.rank == 0:
            snapshot.tensors[layout.ANSWERS] = lambda: said
    if topology.rank == 0:
        facts = _run_facts(config, engine, counters, inputs)
        facts |= {} if history is None else history.facts(counters.iteration)
        snapshot.texts[layout.RUN] = json.dumps(facts, indent=1)
        stored = config.without_secrets()
        snapshot.texts[layout.RESOLVED] = serialize.to_json(stored)
        for name, text in (stored.checkpoint.config_files or {}).items():
            snapshot.texts[f"{layout.CONFIGS}/{Path(name).name}"] = str(text)
    return snapshot


def _add_weights(
    snapshot: Snapshot,
    config: Config,
    engine: Checkpointable,
    counters: Counters,
    shards: dict[str, Tensor],
    padded_vocab_size: int,
) -> None:
    topology = engine.topology
    stored = weight_shards.public_biases(shards, summed=config.model.gpt_j_residual, model_rank=topology.model.rank)
    facts = public_facts(
        config.model,
        iteration=counters.iteration,
        consumed_samples=counters.consumed_samples,
        skipped=counters.skipped,
        data_size=config.parallelism.data_parallel_size,
        model_size=topology.model.size,
        tokenizer_type=config.tokenizer.tokenizer_type,
        divisible_by=config.tokenizer.make_vocab_size_divisible_by,
        padded_vocab_size=padded_vocab_size,
    )
    path = layout.model_file(topology.model_parallel.rank)
    if not engine.pipelined:
        snapshot.tensors[path] = partial(weight_shards.model_file_content, stored, facts)
        return
    snapshot.tensors[path] = lambda: {"module": None, **facts}
    for layer, content in weight_shards.by_layer(stored).items():
        name = layout.layer_file(layer, topology.model.rank)
        snapshot.tensors[name] = partial(weight_shards.layer_content, content)


def _run_facts(config: Config, engine: Checkpointable, counters: Counters, inputs: RunInputs) -> dict[str, Any]:
    """Counters, layout and versions, for people and for resuming."""
    topology = engine.topology
    return {
        "version": integrity.VERSION,
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
        "schedule": schedule_facts(config.schedule, config.optimizer),
        "loss_scaling": {} if config.checkpoint.no_save_optim else engine.loss_scaling(),
        "optimizer": config.optimizer.optimizer_type,
        "mup": parametrisation_facts(config.mup),
        **inputs.as_json(),
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__},
    }
