"""The families that can be taken over and given away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.family import Family
from megatron.checkpoint.huggingface.gpt2 import GPT2
from megatron.checkpoint.huggingface.gpt_neox import GPT_NEOX
from megatron.checkpoint.huggingface.llama import LLAMA, MISTRAL
from megatron.config.sections.model import ModelSection
from megatron.errors import ConfigError

FAMILIES = {family.name: family for family in (GPT_NEOX, LLAMA, MISTRAL, GPT2)}


def family_for(model: ModelSection, name: str | None = None) -> Family:
    """The family that can express a model: the named one, else the first that can.

    Raises ConfigError that names each key in the way.
    """
    if name is not None:
        ConfigError.raise_any(FAMILIES[name].misfits(model))
        return FAMILIES[name]
    faults = {family.name: family.misfits(model) for family in FAMILIES.values()}
    for known, found in faults.items():
        if not found:
            return FAMILIES[known]
    raise ConfigError(*min(faults.values(), key=len))


def family_of(theirs: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json names. ConfigError when it is not one of ours."""
    for family in FAMILIES.values():
        if family.model_type == theirs.get("model_type"):
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise ConfigError.of(
        f"models of this type cannot be taken over; these can: {known}",
        key="model_type",
        value=theirs.get("model_type"),
        where=where,
    )
