"""Config: all sections, and their flat view as key -> value.

Every key belongs to one section; `FIELDS` lists it with its type, default, choices, unit and documentation.
A Config is frozen: `replace` makes another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_type_hints

from pydantic import ValidationError

from megatron.config.field import Section
from megatron.config.schema.checkpoint import CheckpointSection
from megatron.config.schema.data import DataSection
from megatron.config.schema.deepspeed import DeepspeedSection
from megatron.config.schema.evaluation import EvaluationSection
from megatron.config.schema.generation import GenerationSection
from megatron.config.schema.initialization import InitializationSection
from megatron.config.schema.kernels import KernelsSection
from megatron.config.schema.launch import LaunchSection
from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.config.schema.mup import MupSection
from megatron.config.schema.observe import ObserveSection
from megatron.config.schema.optimizer import OptimizerSection
from megatron.config.schema.parallelism import ParallelismSection
from megatron.config.schema.precision import PrecisionSection
from megatron.config.schema.preference import PreferenceSection
from megatron.config.schema.recompute import RecomputeSection
from megatron.config.schema.retrieval import RetrievalSection
from megatron.config.schema.schedule import ScheduleSection
from megatron.config.schema.task import TaskSection
from megatron.config.schema.tokenizer import TokenizerSection
from megatron.config.schema.training import TrainingSection
from megatron.config.schema.transformer_engine import TransformerEngineSection
from megatron.config.secrets import SECRETS, text_without_secrets
from megatron.config.type_names import type_name, value_type_name
from megatron.errors import ConfigError, ConfigIssue
from megatron.registry import nearest_name


@dataclass(frozen=True)
class FieldInfo:
    """Metadata of one key."""

    name: str
    """The key."""
    section: str
    """The attribute of Config that holds it."""
    annotation: Any
    """Its type."""
    default: Any
    """Its default value."""
    doc: str
    """Its documentation."""
    unit: str | None
    """The unit of a number, such as "steps"."""
    names: Callable[[], tuple[str, ...]] | None = None
    """Returns the choices; None where any value is allowed."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The strings allowed, () for any; components of plugins included."""
        return self.names() if self.names is not None else ()


@dataclass(frozen=True)
class Config:
    """A complete configuration, with one section per topic."""

    model: ModelSection
    """Sizes and parts of the model."""
    initialization: InitializationSection
    """Initial values."""
    kernels: KernelsSection
    """Implementations of operations."""
    mixers: MixersSection
    """Mamba, RWKV and gMLP blocks."""
    moe: MoeSection
    """Experts and routers."""
    parallelism: ParallelismSection
    """Tensor, pipeline, context and expert parallelism."""
    recompute: RecomputeSection
    """Recomputation of activations."""
    optimizer: OptimizerSection
    """Optimizer and clipping."""
    schedule: ScheduleSection
    """Learning-rate schedule."""
    precision: PrecisionSection
    """Data types and loss scaling."""
    deepspeed: DeepspeedSection
    """ZeRO and further DeepSpeed settings."""
    data: DataSection
    """Data sets and their splits."""
    tokenizer: TokenizerSection
    """Tokenizer and vocabulary."""
    training: TrainingSection
    """Batch sizes, steps, intervals."""
    preference: PreferenceSection
    """Preference and reward losses."""
    mup: MupSection
    """muP."""
    transformer_engine: TransformerEngineSection
    """Transformer Engine."""
    checkpoint: CheckpointSection
    """Saving and loading."""
    observe: ObserveSection
    """Logs, metrics, profiles."""
    generation: GenerationSection
    """Generation and service."""
    evaluation: EvaluationSection
    """Tasks and validation."""
    task: TaskSection
    """Fine-tuning on a classification task."""
    retrieval: RetrievalSection
    """Encoders of queries and passages."""
    launch: LaunchSection
    """Hosts, launchers, restarts."""

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Config:
        """Builds a Config from key -> value; a key left out takes its default.

        Nothing is derived and no rule is applied: that is `megatron.config.resolve`. Raises ConfigError for unknown
        keys and wrong types, all at once.
        """
        issues = [unknown_key(name) for name in values if name not in FIELDS]
        given: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for name, value in values.items():
            if name in FIELDS:
                given[FIELDS[name].section][name] = value
        sections: dict[str, Section] = {}
        for name, section in SECTIONS.items():
            try:
                sections[name] = section(**given[name])
            except ValidationError as error:
                issues += issues_of(error, section)
        ConfigError.raise_any(issues)
        return cls(**sections)  # type: ignore[arg-type]

    def without_secrets(self) -> Config:
        """Returns the configuration as it is stored and shown: secrets are null, in the texts of its files too."""
        files = self.checkpoint.config_files or {}
        shown = {name: text_without_secrets(text) for name, text in files.items()}
        if shown == files and all(getattr(self, FIELDS[name].section).model_dump()[name] is None for name in SECRETS):
            return self
        return self.replace(**dict.fromkeys(SECRETS), config_files=shown or None)

    def flat(self) -> dict[str, Any]:
        """Returns every key and its value, in the order of FIELDS."""
        return {name: getattr(getattr(self, field.section), name) for name, field in FIELDS.items()}

    def replace(self, **values: Any) -> Config:
        """Returns a Config in which these keys have other values. Nothing is derived again."""
        return Config.from_flat({**self.flat(), **values})

    def for_inference(self, *, drafts: bool = False) -> Config:
        """Returns the Config of generation and evaluation: no optimizer state, ZeRO, recompute or dropout.

        Context parallelism, expert parallelism and the prediction of further tokens are off as well. drafts: keeps the
        modules of the latter where `num_speculative_tokens` asks for them.
        """
        return self.replace(
            zero_optimization={"stage": 0},
            zero_stage=0,
            no_load_optim=True,
            checkpoint_activations=False,
            partition_activations=False,
            recompute_granularity=None,
            sequence_parallel=False,
            context_parallel_size=1,
            moe_expert_parallel_size=1,
            moe_eval_capacity_factor=None,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            mtp_num_layers=self.model.mtp_num_layers if drafts and self.generation.num_speculative_tokens else None,
        )


SECTIONS: Mapping[str, type[Section]] = MappingProxyType(get_type_hints(Config))
"""Attribute of Config -> class of the section."""


def _catalog() -> dict[str, FieldInfo]:
    catalog: dict[str, FieldInfo] = {}
    for section_name, section in SECTIONS.items():
        for name, field in section.model_fields.items():
            assert name not in catalog, f"{name} is in two sections"
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            unit = extra.get("unit")
            catalog[name] = FieldInfo(
                name=name,
                section=section_name,
                annotation=field.annotation,
                default=field.default,
                doc=field.description or "",
                unit=str(unit) if unit else None,
                names=section.choices.get(name),
            )
    return catalog


FIELDS: Mapping[str, FieldInfo] = MappingProxyType(_catalog())
"""Every key and its metadata."""


EXAMPLE_SYNTAX = {
    "zero_optimization": "write {stage: 1}",
    "optimizer": "write {type: Adam, params: {lr: 6.0e-4}}",
    "fp16": "write precision: fp16, or {enabled: true}",
    "bf16": "write precision: bfloat16, or {enabled: true}",
    "autotuning": "write {enabled: true}",
}
"""Example syntax of mappings, for the hint of a type error."""


def unknown_key(name: str, *, value: object = None, location: str | None = None) -> ConfigIssue:
    """Returns the issue of a key that does not exist, with the nearest one that does."""
    if isinstance(value, Mapping) and any(str(inner).replace("-", "_") in FIELDS for inner in value):
        hint = f"write its keys without {name} around them, since keys are not nested"
        return ConfigIssue("there is no such key", key=name, location=location, hint=hint)
    close = nearest_name(name, FIELDS)
    hint = f"did you mean {close}?" if close else "configs/README.md lists every key"
    return ConfigIssue("there is no such key", key=name, location=location, hint=hint)


def issues_of(validation_error: ValidationError, section: type[Section]) -> list[ConfigIssue]:
    """Converts pydantic's errors to one issue per key."""
    issues: dict[str, ConfigIssue] = {}
    for error in validation_error.errors(include_url=False):
        if not error["loc"]:  # the choices, which look at the whole section
            issues["choices"] = ConfigIssue(str(error["msg"]).removeprefix("Value error, "))
            continue
        name = str(error["loc"][0])
        if name not in issues:
            expected = type_name(FIELDS[name].annotation)
            items = [part + 1 for part in error["loc"][1:] if isinstance(part, int)]
            what = f"item {items[0]} is" if items else "this is"
            issues[name] = ConfigIssue(
                f"{what} {value_type_name(error['input'])}", key=name, hint=EXAMPLE_SYNTAX.get(name, f"give {expected}")
            )
    return list(issues.values())
