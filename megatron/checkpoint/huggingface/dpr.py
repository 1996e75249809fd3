"""Dense passage retrieval (arXiv:2004.04906): encoders of questions and of passages, a folder of `transformers` each.

Both are BERTs without a pooler. The embedding of a text is the output of the first token, behind a linear layer where
`projection_dim` is not 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron.checkpoint.huggingface.bert import (
    EncoderKind,
    block_config,
    block_misfits,
    block_settings,
    block_table,
    encoder_names,
)
from megatron.checkpoint.huggingface.family import ModelFamily, Settings, TensorMapping
from megatron.config.derived.retrieval import DPR as OBJECTIVE
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims
from megatron.registry import RETRIEVAL_HEAD


def _misfits(kind: EncoderKind, model: ModelSection) -> list[ConfigIssue]:
    errors = block_misfits(kind, model)
    if model.lm_head != RETRIEVAL_HEAD:
        what = f"a {kind.label} model has embeddings of queries and passages"
        errors.append(ConfigIssue(what, key="lm_head", value=model.lm_head))
    return errors


def _config(kind: EncoderKind, model: ModelSection, padded_vocab_size: int) -> Settings:
    return {**block_config(kind, model, padded_vocab_size), "projection_dim": model.retrieval_projection_size or 0}


def _settings(kind: EncoderKind, theirs: Mapping[str, Any]) -> Settings:
    projection = theirs["projection_dim"]
    return {
        "train_impl": OBJECTIVE,
        **block_settings(kind, theirs),
        **({"retrieval_projection_size": projection} if projection else {}),
    }


def _table(kind: EncoderKind, module: str, dims: ModelDims) -> list[TensorMapping]:
    return block_table(kind, dims, {"projection": f"{module}.encode_proj"} if dims.projection else {})


def _encoder(module: str, architecture: str, passages: ModelFamily | None = None) -> ModelFamily:
    """Returns the family of one of the two.

    Args:
        module: of the class, which the names of its tensors begin with.
        architecture: the class.
        passages: the family of the encoder of passages, for that of questions.
    """
    bert = f"{module}.bert_model"
    kind = EncoderKind(
        label="DPR",
        prefix=bert,
        architecture="DPR",
        names=encoder_names(bert, "", post=True),
        norm_placement="post",
        embedding_norm=f"{bert}.embeddings.LayerNorm",
    )
    return ModelFamily(
        name="dpr",
        model_type="dpr",
        architecture=architecture,
        misfits=partial(_misfits, kind),
        config=partial(_config, kind),
        settings=partial(_settings, kind),
        table=partial(_table, kind, module),
        spare=("embeddings.position_ids",),
        encoder=True,
        prefix=f"{module}.",
        heads=(f"{bert}.pooler.",),
        parts=frozenset({"norm_placement", "embedding_norm"}),
        passages=passages,
    )


QUESTIONS = _encoder("question_encoder", "DPRQuestionEncoder", _encoder("ctx_encoder", "DPRContextEncoder"))
