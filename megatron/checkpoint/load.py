"""Loading: find a complete checkpoint, say what matches, and stop on anything that was not asked for.

Weights go into a module before the engine is built around it; optimizer, counters and random generators follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint import files, integrity, layout, rng
from megatron.checkpoint.handles import Checkpointable
from megatron.checkpoint.save import Counters
from megatron.checkpoint.slices import MASTER, OptimizerState
from megatron.checkpoint.weights import WeightFiles, key_of, read_shards
from megatron.config import Config
from megatron.errors import ConfigError, Mistake, RunError
from megatron.log import get_logger
from megatron.parallel.topology import Topology
from megatron.shapes import TensorShape

_log = get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk, and what the configuration wants of it.

    directory: its folder. with_optimizer, with_rng: whether those are restored (`finetune`, `no_load_optim`,
    `no_load_rng`). table: the tensors of the model that will read it.
    """

    directory: Path
    with_optimizer: bool
    with_rng: bool
    from_start: bool
    summed_biases: bool
    table: tuple[TensorShape, ...]

    def optimizer(self) -> OptimizerState | None:
        """The stored optimizer state. RunError if it is wanted and not there."""
        if not self.with_optimizer:
            return None
        state = OptimizerState.open(self.directory, {key_of(shape): shape for shape in self.table})
        if state is None:
            raise RunError.of(
                "the checkpoint holds no optimizer state",
                where=str(self.directory),
                remedy="set no_load_optim to start the optimizer anew, or finetune to start counting anew too",
            )
        return state

    def counters(self) -> Counters:
        """Where the run stood; zero when only the weights are wanted."""
        if self.from_start:
            return Counters()
        if (self.directory / layout.RUN).is_file():
            return Counters(**files.read_json(self.directory / layout.RUN)["counters"])
        stored = files.read_tensors(next(iter(layout.model_files(self.directory).values())))
        return Counters(iteration=stored["iteration"], consumed_samples=stored.get("global_samples", 0))


def find_checkpoint(config: Config, table: Sequence[TensorShape], *, weights_only: bool = False) -> Checkpoint | None:
    """The checkpoint that `load` and `iteration` name; None when `load` is not set.

    A run whose `load` is the folder it saves to, and which has saved nothing yet, starts fresh, and so does one that
    asks for it with `load_fallback`. Raises ConfigError when there is nothing to load, and RunError when
    what is there is damaged.
    """
    section = config.checkpoint
    if section.load is None:
        return None
    may_start_fresh = section.load == section.save or section.load_fallback == "fresh"
    directory = _directory(section.load, section.iteration, resumes_itself=may_start_fresh)
    if directory is None:
        return None
    if integrity.is_ours(directory):
        RunError.raise_any(_with_remedy(integrity.damage(directory), Path(section.load)))
    from_start = section.finetune or weights_only
    return Checkpoint(
        directory,
        with_optimizer=not (from_start or section.no_load_optim),
        with_rng=not (from_start or section.no_load_rng),
        from_start=from_start,
        summed_biases=config.model.gpt_j_residual,
        table=tuple(table),
    )


def read_weights(checkpoint: Checkpoint, topology: Topology, wanted: Sequence[TensorShape]) -> dict[str, Tensor]:
    """The tensor-parallel shards of the wanted tensors, by key; reports what matched.

    With an optimizer that kept fp32 copies those are returned, since they are the more precise ones.
    Raises RunError naming every tensor that is missing or has another shape.
    """
    stored = WeightFiles.open(checkpoint.directory)
    result = read_shards(
        stored,
        wanted,
        summed=checkpoint.summed_biases,
        model_rank=topology.model.rank,
        model_size=topology.model.size,
    )
    state = checkpoint.optimizer()
    if state is not None:
        for key, tensor in result.items():
            if MASTER in state.names(key):
                master = state.shard(key, MASTER, model_rank=topology.model.rank, model_size=topology.model.size)
                result[key] = master.view(tensor.shape)
    unexpected = sorted(stored.keys() - {key_of(shape) for shape in checkpoint.table})
    _log.info("%s: %d tensors matched, 0 missing, %d unexpected", checkpoint.directory, len(result), len(unexpected))
    if unexpected:
        raise RunError.of(
            f"the checkpoint has tensors that the model lacks: {', '.join(unexpected[:8])}",
            where=str(checkpoint.directory),
            remedy="give the configuration the shape of the checkpoint",
        )
    return result


def restore(checkpoint: Checkpoint, engine: Checkpointable) -> Counters:
    """Puts optimizer and random generators back; returns where the run stood. The weights are in already."""
    state = checkpoint.optimizer()
    if state is not None:
        engine.load_optimizer(state)
    if checkpoint.with_rng:
        _restore_rng(checkpoint, engine)
    return checkpoint.counters()


def _directory(load: str, iteration: int | None, *, resumes_itself: bool) -> Path | None:
    """The folder to read, None for a run that finds its own save folder still empty."""
    root = Path(load)
    found = layout.iterations(root)
    if iteration is not None:
        if iteration not in found:
            raise ConfigError.of(
                f"there is no such checkpoint in {load}", key="iteration", value=iteration, remedy=_offer(found)
            )
        return layout.step_directory(root, iteration)
    if not found:
        if resumes_itself:
            _log.info("%s holds no checkpoint yet: starting fresh", load)
            return None
        raise ConfigError.of(
            "there is no checkpoint" if root.is_dir() else "there is no such folder",
            key="load",
            value=load,
            remedy="correct the path, or set load_fallback: fresh to start from random weights",
        )
    return layout.step_directory(root, _latest(root, found))


def _latest(root: Path, found: list[int]) -> int:
    """The iteration that the file `latest` names, or the highest one if that file is not there."""
    pointer = root / layout.LATEST
    if not pointer.is_file():
        return found[-1]
    named = layout.iteration_of(root / pointer.read_text(encoding="utf-8").strip())
    if named not in found or named is None:
        raise RunError.of("names a checkpoint that is not there", where=str(pointer), remedy=_offer(found))
    return named


def _offer(found: list[int]) -> str:
    if not found:
        return "the folder holds no checkpoints"
    return f"choose one with --iteration: {', '.join(map(str, found))}"


def _with_remedy(faults: list[Mistake], root: Path) -> list[Mistake]:
    remedy = _offer(layout.iterations(root))
    return [Mistake(fault.what, where=fault.where, remedy=remedy) for fault in faults]


def _restore_rng(checkpoint: Checkpoint, engine: Checkpointable) -> None:
    """Each rank takes its own generators back; in another layout ranks mean other things, so they are seeded anew."""
    topology = engine.topology
    path = checkpoint.directory / layout.rng_file(topology.rank)
    run = checkpoint.directory / layout.RUN
    then = files.read_json(run)["layout"] if run.is_file() else {}
    axes = (topology.pipe, topology.data, topology.context, topology.model)
    if path.is_file() and all(then.get(axis.name, 1) == axis.size for axis in axes):
        rng.restore(files.read_tensors(path), engine.random)
        return
    seed = torch.initial_seed() + checkpoint.counters().iteration
    torch.manual_seed(seed)
    _log.info("the layout changed or the generators were not stored: dropout masks are drawn from seed %d on", seed)
