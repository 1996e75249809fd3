"""The kernels that serve a configuration, and why faster ones do not."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from megatron.config import Config
from megatron.config.derived.fill import trains
from megatron.errors import ConfigIssue
from megatron.registry import BIDIRECTIONAL, EIGHT_BIT, NORMS, OPTIMIZERS, POSITIONS, WITHOUT_ATTENTION, Entry
from megatron.registry.attention import SCORES_IN_MEMORY, choose_backends
from megatron.registry.attention_facts import AttentionFacts, Capability
from megatron.registry.kernels import (
    BF16,
    FP16,
    FP32,
    KernelChoice,
    KernelFacts,
    choose_all,
    missing_kernels,
)

_DTYPES = {"fp32": FP32, "fp16": FP16, "bfloat16": BF16}
GENERATIONS: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0), (12, 0))
"""Capabilities of GPUs that a plan answers for, since the launcher does not ask a GPU for its own."""
LINE = 100
_TRANSFORMER_ENGINE = Entry(
    "transformer engine", "megatron.kernels.transformer_engine:Attention", "The package, which `te_mha` asks for"
)


_RING = Entry(
    "ring",
    "megatron.distributed.context_parallel.ring:ring_attention",
    "Keys and values pass from rank to rank (`context_parallel_method`); blocks by the kernels "
    "of kernels/attention_blocks.py",
)


def _forms_a_ring(config: Config) -> bool:
    """Returns whether context parallel ranks pass keys and values on."""
    heads = config.model.num_kv_heads
    return heads is not None and config.parallelism.ring_size(heads) > 1


def facts_of(config: Config, device: str) -> KernelFacts:
    """Returns what decides which kernels can be used. device: `cuda` or `cpu`."""
    dtype = _DTYPES[config.precision.precision or "fp32"]
    return KernelFacts.of(device, dtype, config.kernels, config.model.activation)


def kernel_choices(config: Config, device: str) -> Mapping[str, KernelChoice]:
    """Returns operation -> choice, for the operations that the model and the optimizer have. device: `cuda` or `cpu`.

    Attention has one operation for each kind of block, and for each generation of GPUs where their choices differ.
    """
    every = choose_all(facts_of(config, device), config.kernels)
    used = {NORMS.entry(config.model.norm).kernel, "activation", "cross_entropy"}
    if "attention" in POSITIONS.entry(config.model.pos_emb).enters:
        used.add("rotary")
    if config.model.hidden_dropout > 0:
        used.add("dropout_add")
    if config.moe.moe_num_experts > 1:
        used.add("permutation")
    used.add(_optimizer_kernel(config))
    return {**{name: choice for name, choice in every.items() if name in used}, **_attention(config, device)}


def _optimizer_kernel(config: Config) -> str | None:
    """Returns the operation of the optimizer, or None; a run that trains nothing has no optimizer."""
    section = config.optimizer
    if not trains(config.launch.user_script):
        return None
    family = EIGHT_BIT if section.use_bnb_optimizer else OPTIMIZERS
    return family.entry(section.optimizer_type).kernel


def _attention(config: Config, device: str) -> dict[str, KernelChoice]:
    """Returns operation -> choice for the attention core."""
    kinds = [kind for kind in config.model.attention_config or () if kind not in WITHOUT_ATTENTION]
    if config.transformer_engine.te_mha and device == "cuda":
        return {f"attention ({kind})": KernelChoice(f"attention ({kind})", _TRANSFORMER_ENGINE) for kind in kinds}
    if _forms_a_ring(config):
        return {f"attention ({kind})": KernelChoice(f"attention ({kind})", _RING) for kind in kinds}
    found: dict[str, KernelChoice] = {}
    for kind in dict.fromkeys(kinds):
        groups: dict[str, list[Capability]] = {}
        choices: dict[str, KernelChoice] = {}
        for capability in GENERATIONS if device == "cuda" else (None,):
            choice = _backend(config, device, kind, capability)
            choices.setdefault(choice.entry.name, choice)
            if capability is not None:
                groups.setdefault(choice.entry.name, []).append(capability)
        for name, choice in choices.items():
            on = ", ".join(f"{major}.{minor}" for major, minor in groups.get(name, ()))
            found[f"attention ({kind}{f', capability {on}' if len(choices) > 1 else ''})"] = choice
    return found


def _backend(config: Config, device: str, kind: str, capability: Capability | None) -> KernelChoice:
    facts = AttentionFacts.of(
        facts_of(config, device),
        config.model,
        documents=config.data.reset_attention_mask or config.model.attention_mask == BIDIRECTIONAL,
        deterministic=config.training.deterministic,
        capability=capability,
    )
    return choose_backends(facts, [kind], config.kernels)[kind]


def kernel_issues(config: Config, device: str) -> list[ConfigIssue]:
    """Returns the issues of kernels that are asked for by name and cannot be used on the device."""
    return missing_kernels(kernel_choices(config, device).values(), facts_of(config, device))


def kernel_lines(config: Config, device: str) -> list[str]:
    """Formats the table: implementation, its operations, and why those before it are not used."""
    groups: dict[str, list[tuple[str, KernelChoice]]] = {}
    for operation, choice in kernel_choices(config, device).items():
        groups.setdefault(choice.entry.name, []).append((operation, choice))
    lines = []
    for name, choices in groups.items():
        lines += _wrapped(f"{name}: {', '.join(operation for operation, _ in choices)}", "  ")
        reasons: dict[str, dict[str, None]] = {}
        for _, choice in choices:
            for other, reason in choice.rejected.items():
                reasons.setdefault(reason, {})[other] = None
        for reason, others in reasons.items():
            lines += _wrapped(f"  no {', '.join(others)}: {reason}", "    ")
    return lines


def device_of(config: Config) -> str:
    """Returns the device that the plan is for: `cpu` where the ranks talk through gloo, else `cuda`."""
    return "cpu" if config.launch.distributed_backend == "gloo" else "cuda"


def kinds_with_scores(config: Config, device: str) -> frozenset[str]:
    """Returns the kinds of blocks whose attention saves its scores for the backward pass. device: `cuda` or `cpu`."""
    if _forms_a_ring(config):
        return frozenset()
    kinds = [kind for kind in config.model.attention_config or () if kind not in WITHOUT_ATTENTION]
    found = {kind: _backend(config, device, kind, None).entry for kind in dict.fromkeys(kinds)}
    return frozenset(kind for kind, entry in found.items() if entry.traits >= SCORES_IN_MEMORY)


def kernel_figures(config: Config, device: str) -> dict[str, Any]:
    """Returns the table for JSON: operation -> what serves it, and why those before it do not."""
    return {
        operation: {"served_by": choice.entry.name, "rejected": dict(choice.rejected)}
        for operation, choice in kernel_choices(config, device).items()
    }


def _wrapped(line: str, indent: str) -> list[str]:
    return textwrap.wrap(line, LINE, subsequent_indent=indent, drop_whitespace=True, break_long_words=False)
