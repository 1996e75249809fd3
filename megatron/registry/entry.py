"""Metadata of components, available without importing them.

One dataclass per kind of component. Other code reads the entry and never compares names, so that a component of a
plugin works like a built-in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Entry:
    """A component that a configuration can name."""

    name: str
    """The name in the configuration."""
    target: str
    """`module:attribute`, imported on first use."""
    doc: str
    """One line of documentation."""
    extra: str | None = None
    """The pip extra that installs what the target imports."""
    traits: frozenset[str] = frozenset()
    """Properties that rules ask for, such as `megatron.registry.NEEDS_FULL_TENSORS` of an optimizer."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a component, as the table of a model's tensors lists it."""

    name: str
    """The parameter's name within the module of the component."""
    shape: tuple[int | str, ...]
    """Sizes before tensor parallelism; a string names an attribute of `megatron.param_table.ModelDims`."""
    shard_dim: int | None = None
    """The dimension that tensor parallelism shards; None where every rank has the full tensor."""


@dataclass(frozen=True, kw_only=True)
class NormEntry(Entry):
    """A norm: the target is built as `target(features, epsilon, bias)`."""

    tensors: tuple[str, ...] = ("weight",)
    """Names of its parameters, each with one value per feature."""
    optional: tuple[str, ...] = ()
    """Tensors that `use_bias_in_norms: false` leaves out."""
    scalars: tuple[str, ...] = ()
    """Names of its parameters of one value each; muP has no rule for them."""
    epsilon: str = "layernorm_epsilon"
    """The configuration key of its epsilon."""
    in_transformer_engine: bool = False
    """Whether Transformer Engine's joint layer of norm and MLP computes it."""
    kernel: str | None = None
    """Its operation in the table of kernels, whose choice becomes the module's `compute`; None for its own code."""


@dataclass(frozen=True, kw_only=True)
class FrozenFormatEntry(Entry):
    """A format of frozen weights: the target stores a weight [out, in], as `megatron.kernels.frozen_linear` says."""

    bits: int
    """Of a value, without the fp32 scale of each block."""


@dataclass(frozen=True, kw_only=True)
class PositionEntry(Entry):
    """A position scheme: the target is a subclass of `megatron.model.positions.base.Positions`."""

    enters: frozenset[str] = frozenset()
    """The inputs that positions change: "embedding" (added), "attention" (queries and keys), "scores" (a bias)."""
    embedding: tuple[TensorSpec, ...] = ()
    """Tensors of the module that `for_embedding` builds."""
    scores: tuple[TensorSpec, ...] = ()
    """Tensors of the module that `for_scores` builds, which all blocks share."""
    settings: tuple[str, ...] = ()
    """Keys of the model section that have an effect only with schemes that list them."""


@dataclass(frozen=True, kw_only=True)
class ActivationEntry(Entry):
    """An activation: a function of one tensor."""

    gated: bool = False
    """Whether its input has twice the features of its output: the plain half, then the gate."""
    in_transformer_engine: str | None = None
    """Transformer Engine's name of it, where its joint layer of norm and MLP has it."""
    module: str | None = None
    """`file:name` of its module, where each MLP learns parameters of it; the function has their initial values."""
    parameters: tuple[str, ...] = ()
    """Scalars that the module learns."""


@dataclass(frozen=True)
class Setting:
    """One value that `optimizer.params` may hold."""

    kind: str = "number"
    """Kind of value: "number", "fraction" (in [0, 1)), "count" (from 1), "switch", "betas", "choice" or "any"."""
    choices: tuple[str, ...] = ()
    """The values of a "choice"."""
    unused: str | None = None
    """The reason why it has no effect, for settings of public configurations."""


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry(Entry):
    """An optimizer: the target is called as `target(groups, request)`, see `megatron.optim.builder_args`.

    Without traits it works on flat shards, so that every ZeRO stage is possible, and muP has no rule for it. The traits
    are constants of `megatron.registry.optimizers`.
    """

    settings: Mapping[str, Setting] = field(default_factory=lambda: MappingProxyType({}))
    """Settings of `optimizer.params` beside lr, weight_decay and max_grad_norm."""
    state_per_param: float = 0.0
    """fp32 values of optimizer state per parameter."""
    kernel: str | None = None
    """Its operation in the table of kernels, whose choice the target gets as `args.kernel`; None for its own code."""


@dataclass(frozen=True, kw_only=True)
class ScheduleEntry(Entry):
    """A learning rate schedule: a function of a `megatron.optim.lr_schedule.Moment`."""

    settings: tuple[str, ...] = ("min_lr",)
    """Keys of the schedule section that have an effect only with schedules that list them."""


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry(Entry):
    """A tokenizer: the target is built as `target(vocab_file=..., merge_file=...)`."""

    files: tuple[str, ...] = ("vocab_file",)
    """Keys of the files that it reads."""
    vocab_size: int | str | None = None
    """Its number of ids [tokens], or the `module:function` that reads it from vocab_file, parsed as JSON.

    The function may not import torch. None where only the built tokenizer has the number.
    """


@dataclass(frozen=True, kw_only=True)
class SinkEntry(Entry):
    """A metrics sink: the target has `open(observe, start)`, see `megatron.metrics.sinks.base`."""

    key: str | None = None
    """The key of the observe section that asks for it; `sinks` asks for any by its name."""
