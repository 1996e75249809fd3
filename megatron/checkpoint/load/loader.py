"""Loading: find a whole checkpoint, say what matches, and stop on anything that was not asked for.

Weights go into a module before the engine is built around it; optimizer, counters and random generators follow. A
folder of `transformers` is read as well; it holds weights only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.format import files, layout, logits_check, rng
from megatron.checkpoint.format.optimizer_shards import MASTER, OptimizerState
from megatron.checkpoint.format.weight_shards import StoredWeights, WeightFiles, key_of
from megatron.checkpoint.huggingface.encoder_pair import is_folder, open_folder
from megatron.checkpoint.load import find
from megatron.checkpoint.load.adapter_base import AdapterBase, base_of_checkpoint
from megatron.checkpoint.load.lr_schedule_check import schedule_facts, schedule_to_use, warn_of_early_end
from megatron.checkpoint.load.merge_shards import read_shards
from megatron.checkpoint.load.model_check import same_model, same_trained
from megatron.checkpoint.load.mup_check import same_parametrisation
from megatron.checkpoint.load.run_inputs_check import RunInputs, same_data_order, same_tokenizer
from megatron.checkpoint.load.tower_weights import for_towers
from megatron.checkpoint.load.vocabulary import StoredEmbedding
from megatron.checkpoint.remote.host_copy import by_host, copy_to_missing_hosts, one_folder
from megatron.checkpoint.remote.s3_sync import fetch_missing
from megatron.checkpoint.save.protocol import Checkpointable
from megatron.checkpoint.save.saver import Counters
from megatron.config import Config
from megatron.config.schema.checkpoint import CheckpointSection
from megatron.distributed.mesh import Topology
from megatron.errors import ConfigError, ConfigIssue, RunError
from megatron.log import get_logger
from megatron.param_table import DOWN, MAGNITUDE, PROMPT, ModelDims, TensorShape, is_adapter_tensor, retrieval_tensors
from megatron.ranks import Ranks
from megatron.registry import OPTIMIZERS
from megatron.tokenizer_info import TokenizerInfo

_log = get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk, and what the configuration wants of it."""

    directory: Path
    """Its folder."""
    with_optimizer: bool
    """Whether those are restored (`finetune`, `no_load_optim`, `no_load_rng`)."""
    with_rng: bool
    """See `with_optimizer`."""
    from_start: bool
    """True if training starts at iteration 0 with these weights."""
    summed_biases: bool
    """True if row-parallel biases are stored as terms of a sum."""
    table: tuple[TensorShape, ...]
    """The tensors of the model that will read it."""
    weights: StoredWeights
    """Those that are stored."""
    validated_in: str | None = None
    """The reader's precision, where its logits are to be compared with the kept ones."""
    optimizer_type: str = "adam"
    """The reader's."""
    may_add: bool = False
    """What is trained beside a frozen model may be missing, and starts anew."""
    new_head: bool = False
    """The head begins anew, and those of the stored model are left out."""
    heads: tuple[int, ...] = (1 << 30,)
    """Layer index of the output layer of each encoder; behind the last are modules that predict further tokens."""

    def optimizer(self) -> OptimizerState | None:
        """The stored optimizer state. RunError if it is wanted and not there, ConfigError if it is of another kind."""
        if not self.with_optimizer:
            return None
        self._same_optimizer()
        state = OptimizerState.open(self.directory, {key_of(shape): shape for shape in self.table}, self.rows)
        if state is None:
            raise RunError.of(
                "the checkpoint holds no optimizer state",
                location=str(self.directory),
                hint="set no_load_optim to start the optimizer anew, or finetune to start counting anew too",
            )
        same_trained(self.table, state, self.directory)
        return state.with_weights(self._shard) if self._embedding.dtype == torch.float32 else state

    def _same_optimizer(self) -> None:
        """The forms of Adam can go on with each other's state; any other optimizer only with its own."""
        path, own = self.directory / layout.RUN, self.optimizer_type
        stored = files.read_json(path).get("optimizer", own) if path.is_file() else own
        alike = all(name in OPTIMIZERS and "moments" in OPTIMIZERS.entry(name).traits for name in (stored, own))
        if stored != own and not alike:
            raise ConfigError.of(
                f"the checkpoint {self.directory} was trained with {stored}",
                key="optimizer",
                value=own,
                hint="set no_load_optim to start the optimizer anew",
            )

    def _shard(self, key: str, model_rank: int, model_size: int) -> Tensor:
        """A weight as stored, which is the fp32 copy of a run in a lower precision."""
        shapes, summed = [self._shapes[key]], self.summed_biases
        found = read_shards(self.weights, shapes, summed=summed, model_rank=model_rank, model_size=model_size)
        return found[key].flatten()

    @cached_property
    def _shapes(self) -> dict[str, TensorShape]:
        return {key_of(shape): shape for shape in self.table}

    @cached_property
    def _embedding(self) -> StoredEmbedding:
        return StoredEmbedding.of(self.weights)

    @property
    def rows(self) -> int:
        """Rows of the stored embedding."""
        return self._embedding.rows

    def adapter_base(self) -> AdapterBase:
        """The base of adapters that are trained on from here."""
        return base_of_checkpoint(self.directory, self.rows)

    def counters(self) -> Counters:
        """Counters of the run; zero when only the weights are requested."""
        if self.from_start:
            return Counters()
        if (self.directory / layout.RUN).is_file():
            return Counters(**files.read_json(self.directory / layout.RUN)["counters"])
        found = layout.model_files(self.directory)
        if not found:
            return Counters()
        stored = files.read_tensors(next(iter(found.values())))
        iteration = stored.get("iteration", stored.get("total_iters", stored.get("global_steps", 0)))
        return Counters(iteration=iteration, consumed_samples=stored.get("global_samples", 0))

    def require_data_order(self, inputs: RunInputs, *, override: bool) -> None:
        """ConfigError unless the samples go on in the order of the checkpoint's run; override: it may be another.

        A model with other tensors is reported when these are read, since its samples may be shorter for that reason.
        """
        path = self.directory / layout.RUN
        same_model = self.weights.keys() == self._shapes.keys()
        if same_model and not self.from_start and inputs.data is not None and path.is_file():
            same_data_order(files.read_json(path).get("data"), inputs.data, self.directory, override=override)

    def schedule(self, config: Config) -> Config:
        """The configuration with the learning-rate schedule to use. ConfigError where the stored one differs.

        `override_lr_scheduler` keeps the configuration's, `use_checkpoint_lr_scheduler` takes the checkpoint's; where
        iterations are counted anew there is nothing to compare.
        """
        section, path = config.schedule, self.directory / layout.RUN
        if self.from_start or section.override_lr_scheduler or not path.is_file():
            return config
        own = schedule_facts(section, config.optimizer)
        stored = files.read_json(path).get("schedule") or {}
        use = schedule_to_use(stored, own, take_stored=section.use_checkpoint_lr_scheduler, location=self.directory)
        if use != own:
            warn_of_early_end(use, config.training.train_iters, self.directory)
        return config if use == own else _with_schedule(config, use)


def _with_schedule(config: Config, use: Mapping[str, Any]) -> Config:
    block = dict(config.optimizer.optimizer or {})
    block["params"] = {**config.optimizer.params, "lr": use["lr"]}
    return config.replace(**use, optimizer=block)


def make_available(section: CheckpointSection, *, shared: bool) -> None:
    """Puts the checkpoint that `load` names where every rank can read it. Collective.

    Fetches it from the bucket of `s3_path` where no host has it, and copies it between hosts that share no files.

    Args:
        section: names the folder, the iteration and the bucket.
        shared: whether all hosts see the same files.

    """
    fetch_missing(section, Ranks.from_environment())
    copy_to_missing_hosts(section, shared=shared)


def find_checkpoint(
    config: Config, table: Sequence[TensorShape], *, tokenizer: TokenizerInfo | None = None, weights_only: bool = False
) -> Checkpoint | None:
    """The checkpoint that `load` and `iteration` name; None when `load` is not set. Collective.

    Raises ConfigError when there is nothing to load, and RunError when what is there is damaged.

    Args:
        config: The run's configuration.
        table: Tensors of the run's model.
        tokenizer: The reader's, which must be the checkpoint's. A run whose `load` is the folder it saves to, and which
            has saved nothing yet, starts fresh, and so does one that asks for it with `load_fallback`.
        weights_only: Read neither optimizer nor random state.
    """
    section = config.checkpoint
    if section.load is None:
        return None
    from_start = section.finetune or weights_only
    gets_head = section.finetune and section.pretrained_checkpoint == section.load
    root, dims = Path(section.load), ModelDims.of(config.model, config.moe, config.mixers)
    weights: StoredWeights
    if is_folder(root):
        directory = root
        weights = open_folder(root).weights(dims, new_head=gets_head)
    else:
        sharing = one_folder() if config.data.use_shared_fs else by_host()
        found = find.find_intact(
            root, section.iteration, section.load_fallback, repair=not weights_only, sharing=sharing
        )
        if found is None:
            _nothing(config, root)
            return None
        directory = found
        if (directory / layout.RESOLVED).is_file():
            trained = files.read_json(directory / layout.RESOLVED)
            finetune = section.finetune and not weights_only
            same_model(trained, config.flat(), directory, finetune=finetune, new_head=gets_head)
        if (directory / layout.RUN).is_file():
            stored = files.read_json(directory / layout.RUN)
            same_parametrisation(stored.get("mup", {}), config.mup, directory)
            if tokenizer is not None:
                same_tokenizer(
                    stored.get("tokenizer"),
                    tokenizer,
                    directory,
                    new_tokens=section.finetune and not weights_only,
                    trains=not weights_only,
                )
        weights = WeightFiles.open(directory)
    return Checkpoint(
        directory,
        with_optimizer=not (from_start or section.no_load_optim),
        with_rng=not (from_start or section.no_load_rng),
        from_start=from_start,
        summed_biases=config.model.gpt_j_residual,
        table=tuple(table),
        weights=for_towers(weights, dims) if gets_head else weights,
        validated_in=config.precision.precision if section.checkpoint_validation_with_forward_pass else None,
        optimizer_type=config.optimizer.optimizer_type,
        may_add=section.finetune and not weights_only,
        new_head=gets_head,
        heads=dims.output_layers,
    )


def _nothing(config: Config, root: Path) -> None:
    """ConfigError for a `load` without a checkpoint, unless that is how the first part of a run begins."""
    section = config.checkpoint
    iteration = layout.iteration_of(root)
    if root.is_dir() and iteration is not None and (layout.model_files(root) or layout.layer_files(root)):
        raise ConfigError.of(
            "this is one checkpoint, and load names the folder of all of a run",
            key="load",
            value=section.load,
            hint=f"set load: {root.parent} and iteration: {iteration}",
        )
    itself = section.save is not None and layout.same_folder(Path(section.save), root)
    if not itself and section.load_fallback != find.FRESH:
        raise ConfigError.of(
            "there is no checkpoint" if root.is_dir() else "there is no such folder",
            key="load",
            value=section.load,
            hint="correct the path, or set load_fallback: fresh to start from random weights",
        )
    _log.info("%s holds no checkpoint yet: starting fresh", root)


def read_weights(checkpoint: Checkpoint, topology: Topology, requested: Sequence[TensorShape]) -> dict[str, Tensor]:
    """The tensor-parallel shards of the wanted tensors, by key; reports what matched.

    With an optimizer that kept fp32 copies those are returned, since they are the more precise ones.
    What `finetune` adds to the model and the checkpoint lacks is left out. Raises RunError naming every tensor that is
    missing, unexpected or has another shape.
    """
    stored = checkpoint.weights
    found = _without_heads(checkpoint, _without_further_tokens(checkpoint, stored.keys()))
    added = {key_of(shape) for shape in checkpoint.table if _begins_anew(shape, checkpoint)}
    added |= retrieval_tensors(checkpoint.table)
    expected = {key_of(shape) for shape in checkpoint.table}
    unexpected, missing = sorted(found - expected), sorted(expected - found)
    anew = added.intersection(missing) if checkpoint.may_add else set()
    missing = [key for key in missing if key not in anew]
    counts = (len(expected & found), len(missing), len(unexpected))
    asked = f", {len(anew)} added to it as asked for" if anew else ""
    _log.info("%s: %d tensors matched, %d missing, %d unexpected%s", checkpoint.directory, *counts, asked)
    if unexpected or missing:
        raise RunError(*_strangers(unexpected, missing, added, str(checkpoint.directory)))
    axis = topology.model
    summed = checkpoint.summed_biases
    requested = [shape for shape in requested if key_of(shape) not in anew]
    result = read_shards(stored, requested, summed=summed, model_rank=axis.rank, model_size=axis.size)
    state = checkpoint.optimizer()
    if state is not None:
        for key, tensor in result.items():
            if MASTER in state.names(key):
                master = state.shard(key, MASTER, model_rank=axis.rank, model_size=axis.size)
                result[key] = master.view(tensor.shape)
    return result


def _without_further_tokens(checkpoint: Checkpoint, found: set[str]) -> set[str]:
    """The stored tensors, without those of modules that predict further tokens where the model has none."""
    if any(shape.layer > checkpoint.heads[-1] for shape in checkpoint.table):
        return found
    remaining = {key for key in found if int(key.partition(".")[0]) <= checkpoint.heads[-1]}
    if len(remaining) < len(found):
        left, of = len(found) - len(remaining), "of modules that predict further tokens (mtp_num_layers)"
        if checkpoint.with_optimizer:
            hint = "set mtp_num_layers as that run did, or finetune: true to train on without them"
            what = f"it has {left} tensors {of}, which this run would lose"
            raise RunError.of(what, location=str(checkpoint.directory), hint=hint)
        _log.info("%s: %d tensors %s are left out", checkpoint.directory, left, of)
    return remaining


def _without_heads(checkpoint: Checkpoint, found: set[str]) -> set[str]:
    """The stored tensors, without those of a pretrained model's heads, but for the pooler or projection."""
    if not checkpoint.new_head:
        return found
    expected = {shape.key for shape in checkpoint.table}
    of_heads = {key for key in found if int(key.partition(".")[0]) in checkpoint.heads}
    left = {key for key in of_heads if key.split(".")[1] not in ("pooler", "projection") or key not in expected}
    if left:
        _log.info("%s: %d tensors of its heads are left out", checkpoint.directory, len(left))
    return found - left


def _begins_anew(shape: TensorShape, checkpoint: Checkpoint) -> bool:
    """Whether a model that is trained on may get the tensor.

    These are adapters, the biases that balance experts, modules that predict further tokens, and a classifier's head.
    """
    head = checkpoint.new_head and shape.layer in checkpoint.heads
    return is_adapter_tensor(shape) or shape.kind == "buffer" or shape.layer > checkpoint.heads[-1] or head


def _strangers(unexpected: list[str], missing: list[str], added: set[str], location: str) -> list[ConfigIssue]:
    """added: the keys of what is trained beside a frozen model."""
    hint = "give the configuration the shape of the checkpoint, or load another one"
    if not unexpected and added.issuperset(missing):
        hint = "set finetune: true to start them beside the checkpoint's model"
    elif any(f".{name}." in key for key in unexpected for name in (DOWN, MAGNITUDE)):
        hint = "give the configuration the lora of the checkpoint, or merge it with tools/merge_lora.py"
    elif f"0.{PROMPT}" in unexpected:
        hint = "give the configuration the soft_prompt_tuning of the checkpoint"
    groups = {
        "the checkpoint has tensors that the model lacks": unexpected,
        "the model has tensors that the checkpoint lacks": missing,
    }
    return [
        ConfigIssue(f"{what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}", location=location, hint=hint)
        for what, names in groups.items()
        if names
    ]


def restore(checkpoint: Checkpoint, engine: Checkpointable) -> Counters:
    """Restores optimizer and random generators; returns the counters of the run. The weights are in already."""
    state = checkpoint.optimizer()
    if state is not None:
        engine.load_optimizer(state)
        run = checkpoint.directory / layout.RUN
        engine.load_loss_scaling(files.read_json(run).get("loss_scaling", {}) if run.is_file() else {})
    if checkpoint.with_rng:
        _restore_rng(checkpoint, engine)
    with engine.saved_weights():
        validate(checkpoint, engine)
    return checkpoint.counters()


def validate(checkpoint: Checkpoint, engine: logits_check.Scoring) -> None:
    """Compares the loaded model's logits with the kept ones, where that is wanted; collective. RunError."""
    if checkpoint.validated_in is not None:
        logits_check.compare(checkpoint.directory, engine, checkpoint.validated_in)


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
