"""The kernels that serve a configuration, and why faster ones do not."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config import Config
from megatron.errors import ConfigIssue
from megatron.registry import NORMS, POSITIONS
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


def facts_of(config: Config, device: str) -> KernelFacts:
    """Returns what decides which kernels can be used. device: `cuda` or `cpu`."""
    dtype = _DTYPES[config.precision.precision or "fp32"]
    return KernelFacts.of(device, dtype, config.kernels, config.model.activation)


def kernel_choices(config: Config, device: str) -> Mapping[str, KernelChoice]:
    """Returns operation -> choice, for the operations that the model has. device: `cuda` or `cpu`."""
    every = choose_all(facts_of(config, device), config.kernels)
    used = {NORMS.entry(config.model.norm).kernel, "activation", "cross_entropy"}
    if "attention" in POSITIONS.entry(config.model.pos_emb).enters:
        used.add("rotary")
    if config.model.hidden_dropout > 0:
        used.add("dropout_add")
    if config.moe.moe_num_experts > 1:
        used.add("permutation")
    return {name: choice for name, choice in every.items() if name in used}


def kernel_issues(config: Config, device: str) -> list[ConfigIssue]:
    """Returns the issues of kernels that are asked for by name and cannot be used on the device."""
    return missing_kernels(kernel_choices(config, device).values(), facts_of(config, device))


def kernel_lines(config: Config, device: str) -> list[str]:
    """Formats the table: implementation, its operations, and why those before it are not used."""
    groups: dict[str, list[KernelChoice]] = {}
    for choice in kernel_choices(config, device).values():
        groups.setdefault(choice.entry.name, []).append(choice)
    lines = []
    for name, choices in groups.items():
        lines.append(f"{name}: {', '.join(choice.operation for choice in choices)}")
        reasons = {f"no {other}: {reason}": None for choice in choices for other, reason in choice.rejected.items()}
        lines += [f"  {reason}" for reason in reasons]
    return lines
