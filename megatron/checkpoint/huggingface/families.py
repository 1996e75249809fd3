"""The families that can be taken over and given away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.apertus import APERTUS
from megatron.checkpoint.huggingface.bert import BERT, MEGATRON_BERT, ROBERTA
from megatron.checkpoint.huggingface.cohere2 import COHERE2
from megatron.checkpoint.huggingface.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron.checkpoint.huggingface.dpr import QUESTIONS
from megatron.checkpoint.huggingface.family import ModelFamily, lacking_parts
from megatron.checkpoint.huggingface.gemma import GEMMA2, GEMMA3
from megatron.checkpoint.huggingface.glm4_moe import GLM4_MOE
from megatron.checkpoint.huggingface.gpt2 import GPT2
from megatron.checkpoint.huggingface.gpt_neox import GPT_NEOX
from megatron.checkpoint.huggingface.gpt_oss import GPT_OSS
from megatron.checkpoint.huggingface.granite import GRANITE
from megatron.checkpoint.huggingface.llama import LLAMA, MISTRAL, MIXTRAL
from megatron.checkpoint.huggingface.mamba import MAMBA
from megatron.checkpoint.huggingface.mamba2 import MAMBA2
from megatron.checkpoint.huggingface.mpt import MPT
from megatron.checkpoint.huggingface.nemotron_h import NEMOTRON_H
from megatron.checkpoint.huggingface.olmo import OLMO2, OLMO3
from megatron.checkpoint.huggingface.olmoe import OLMOE
from megatron.checkpoint.huggingface.opt import OPT
from megatron.checkpoint.huggingface.phi3 import PHI3
from megatron.checkpoint.huggingface.plain_decoders import NEMOTRON, STARCODER2
from megatron.checkpoint.huggingface.qwen import QWEN2, QWEN3
from megatron.checkpoint.huggingface.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from megatron.checkpoint.huggingface.qwen3_next import QWEN3_NEXT
from megatron.checkpoint.huggingface.qwen_moe import QWEN2_MOE, QWEN3_MOE
from megatron.checkpoint.huggingface.smollm3 import SMOLLM3
from megatron.checkpoint.huggingface.t5 import T5
from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.registry import BIDIRECTIONAL, CAUSAL, RETRIEVAL_HEAD, WITHOUT_ATTENTION

EARLIER = (GPT_NEOX, LLAMA, MISTRAL, MIXTRAL, QWEN3, GPT2, OPT, MPT, MAMBA, MEGATRON_BERT, T5)
LATER = (
    QWEN2,
    GEMMA2,
    GEMMA3,
    OLMO2,
    OLMO3,
    SMOLLM3,
    PHI3,
    COHERE2,
    GRANITE,
    STARCODER2,
    NEMOTRON,
    MAMBA2,
    APERTUS,
    BERT,
    ROBERTA,
    QUESTIONS,
)
WITH_EXPERTS = (
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GLM4_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
    NEMOTRON_H,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
)
FAMILIES = {family.name: family for family in (*EARLIER, *LATER, *WITH_EXPERTS)}
"""In the order in which they are tried: a model that several can express keeps the family that it had."""


def family_for(
    model: ModelSection,
    moe: MoeSection,
    mixers: MixersSection,
    name: str | None = None,
    preferred: str | None = None,
) -> ModelFamily:
    """The family that can express a model: the named one, else the preferred one, else the first that can.

    Raises ConfigError that names each key in the way, and for a name that is no family's.

    Args:
        model: Shape and parts of the model.
        moe: Settings of experts.
        mixers: Settings of Mamba and other mixers.
        name: Name of a family; None takes one that fits.
        preferred: Name of the family to try first.
    """
    if preferred is not None and preferred not in FAMILIES:
        hint = f"there are {', '.join(sorted(FAMILIES))}"
        raise ConfigError.of("there is no such family", key="hf_architecture", value=preferred, hint=hint)
    if name is not None:
        ConfigError.raise_any(_misfits(FAMILIES[name], model, moe, mixers))
        return FAMILIES[name]
    order = sorted(FAMILIES.values(), key=lambda family: family.name != preferred)
    errors = {family.name: _misfits(family, model, moe, mixers) for family in order}
    for known, found in errors.items():
        if not found:
            return FAMILIES[known]
    likely = list(FAMILIES.values())
    if moe.moe_num_experts > 1:
        likely = [family for family in FAMILIES.values() if family.experts is not None]
    elif model.lm_head == RETRIEVAL_HEAD:
        likely = [family for family in FAMILIES.values() if family.passages is not None]
    elif model.attention_mask == BIDIRECTIONAL:
        likely = [family for family in FAMILIES.values() if family.encoder]
    elif model.encoder_num_layers is not None:
        likely = [family for family in FAMILIES.values() if family.encoder_decoder]
    elif WITHOUT_ATTENTION & set(map(str, model.attention_config or ())):
        likely = [family for family in FAMILIES.values() if family.mixers is not None]
    raise ConfigError(*min((errors[family.name] for family in likely), key=len))


def _misfits(family: ModelFamily, model: ModelSection, moe: MoeSection, mixers: MixersSection) -> list[ConfigIssue]:
    """What of a model a family cannot say."""
    errors = family.misfits(model) + lacking_parts(model, family.parts, family.name)
    if family.encoder != (model.attention_mask == BIDIRECTIONAL):
        what = f"a model of the family {family.name} is {BIDIRECTIONAL if family.encoder else CAUSAL}"
        errors.append(ConfigIssue(what, key="attention_mask", value=model.attention_mask))
    if family.encoder_decoder != (model.encoder_num_layers is not None):
        what = f"a model of the family {family.name} has {'an encoder' if family.encoder_decoder else 'one stack'}"
        errors.append(ConfigIssue(what, key="encoder_num_layers", value=model.encoder_num_layers))
    if model.retro_add_retriever:
        errors.append(ConfigIssue("transformers has no attention to neighbours", key="retro_add_retriever", value=True))
    known = family.mixers.kinds if family.mixers else frozenset()
    others = sorted((set(map(str, model.attention_config or ())) & WITHOUT_ATTENTION) - known)
    if others:
        what = f"a model of the family {family.name} has no blocks of kind {', '.join(others)}"
        errors.append(ConfigIssue(what, key="attention_config", value=others))
    if family.mixers is not None:
        errors += family.mixers.misfits(model, mixers)
    if family.experts is not None:
        return errors + family.experts.misfits(model, moe)
    if moe.moe_num_experts > 1:
        what = f"a model of the family {family.name} has no experts"
        errors.append(ConfigIssue(what, key="moe_num_experts", value=moe.moe_num_experts))
    return errors


def family_of(theirs: Mapping[str, Any], location: str) -> ModelFamily:
    """The family that a config.json names. ConfigError when it is not one of ours."""
    for family in FAMILIES.values():
        if family.model_type == theirs.get("model_type"):
            return family if family.passages is None else _encoder_of(family, family.passages, theirs, location)
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise ConfigError.of(
        f"models of this type cannot be taken over; these can: {known}",
        key="model_type",
        value=theirs.get("model_type"),
        location=location,
    )


def _encoder_of(questions: ModelFamily, passages: ModelFamily, theirs: Mapping[str, Any], location: str) -> ModelFamily:
    """The family of the encoder that a config.json names. ConfigError for another class, or none.

    Args:
        questions: of the encoder of questions.
        passages: of the encoder of passages.
        theirs: config.json.
        location: the file, for messages.
    """
    found = theirs.get("architectures")
    for family in (questions, passages):
        if found == [family.architecture]:
            return family
    what = f"only {questions.architecture} and {passages.architecture} can be taken over"
    hint = None if found else f"write which of them it is: [{questions.architecture}]"
    raise ConfigError.of(what, key="architectures", value=found, location=location, hint=hint)
