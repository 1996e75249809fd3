"""Encoders of masked tokens: BERT, RoBERTa and Megatron's BERT, with the heads of `transformers`.

- BERT (arXiv:1810.04805): norms on the residual after each addition, and on the embeddings
- RoBERTa (arXiv:1907.11692): the same, positions from 2 on, one token type; its classifier pools with layers of its own
- Megatron's BERT (arXiv:1909.08053, figure 7): norms before attention and MLP, and one behind the last block

The heads are masked tokens with or without the order of segments, classes, and answers of a question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron.checkpoint.huggingface.family import (
    ModelFamily,
    Settings,
    TensorMapping,
    check_config,
    choose,
    same,
    special_attention,
    unlike,
)
from megatron.checkpoint.huggingface.name_map import Names
from megatron.config.derived.encoder import MASKED
from megatron.config.derived.task import CLASSES
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.param_table import ModelDims
from megatron.registry import RETRIEVAL_HEAD

_ACTIVATIONS = {"gelu": "gelu"}
"""All activate the layer before the output matrix too, which is gelu here."""


@dataclass(frozen=True)
class EncoderKind:
    """One of them."""

    label: str
    """What messages call it."""
    prefix: str
    """What the names of its modules begin with."""
    architecture: str
    """What the names of its classes begin with."""
    names: Names
    """Of its tensors."""
    norm_placement: str
    """Where its blocks have norms."""
    masked: Mapping[str, str] = field(default_factory=dict)
    """Module of the head of masked tokens -> theirs."""
    bias: str = ""
    """Bias of the vocabulary."""
    classifier: Mapping[str, str] = field(default_factory=dict)
    """Module of a classifier -> theirs."""
    choice: Mapping[str, str] = field(default_factory=dict)
    """Module of a multiple-choice model -> theirs."""
    orders: bool = True
    """Whether a class of theirs learns the order of segments."""
    offset: int = 0
    """Rows of the learned positions before the first one."""
    embedding_norm: str | None = None
    """Norm of the embeddings, if any."""

    @property
    def classes(self) -> dict[str, str]:
        """Head -> class."""
        ends = {"order": "PreTraining", "masked": "MaskedLM", "classes": "SequenceClassification"}
        return {head: f"{self.architecture}For{end}" for head, end in {**ends, "answers": "MultipleChoice"}.items()}


def _head(model: ModelSection) -> str:
    if model.num_classes is not None:
        return "classes" if model.num_classes > 1 else "answers"
    return "order" if model.bert_binary_head else "masked"


def _misfits(kind: EncoderKind, model: ModelSection) -> list[ConfigIssue]:
    errors = block_misfits(kind, model)
    if model.lm_head == RETRIEVAL_HEAD:
        what = f"a {kind.label} model has no embeddings of queries and passages"
        errors.append(ConfigIssue(what, key="lm_head", value=model.lm_head))
    if model.bert_binary_head and not kind.orders:
        what = f"a {kind.label} model does not learn the order of segments"
        errors.append(ConfigIssue(what, key="bert_binary_head", value=True))
    return errors


def block_misfits(kind: EncoderKind, model: ModelSection) -> list[ConfigIssue]:
    """Returns what of a model, its heads aside, such an encoder has not."""
    expected = {"norm": "layernorm", "pos_emb": "learned", "gpt_j_residual": False, "use_bias_in_norms": True}
    expected |= {"activation": "gelu", "num_kv_heads": model.num_attention_heads, "opt_pos_emb_offset": kind.offset}
    expected |= {"use_bias_in_mlp": True, "use_bias_in_attn_linear": True, "use_qk_layernorm": False}
    expected |= {"norm_placement": kind.norm_placement, "embedding_norm": kind.embedding_norm is not None}
    expected |= {"softmax_scale": None, "scale_embeddings": False, "embedding_multiplier": 1.0}
    expected |= {"residual_multiplier": 1.0, "layer_types": None}
    expected |= {"add_qkv_bias": model.add_qkv_bias if model.add_qkv_bias is not False else None}
    errors = unlike(model, expected, kind.label) + special_attention(model, kind.label)
    dims = ModelDims.of(model)
    if dims.head_dim * dims.num_attention_heads != dims.hidden_size:
        what = f"a {kind.label} model has hidden_size / heads"
        errors.append(ConfigIssue(what, key="kv_channels", value=model.kv_channels))
    if not dims.token_types:
        what = f"a {kind.label} model adds the vectors of token types"
        hint = "train it with num_token_types: 2"
        errors.append(ConfigIssue(what, key="num_token_types", value=0, hint=hint))
    return errors


def _config(kind: EncoderKind, model: ModelSection, padded_vocab_size: int) -> Settings:
    return {
        "architectures": [kind.classes[_head(model)]],
        **block_config(kind, model, padded_vocab_size),
        "tie_word_embeddings": True,
        **({"pad_token_id": kind.offset - 1} if kind.offset else {}),
    }


def block_config(kind: EncoderKind, model: ModelSection, padded_vocab_size: int) -> Settings:
    """Returns the keys of config.json for embeddings and blocks."""
    assert model.max_position_embeddings is not None
    return {
        "vocab_size": padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.max_position_embeddings + kind.offset,
        "type_vocab_size": model.num_token_types,
        "hidden_act": "gelu",
        "layer_norm_eps": model.layernorm_epsilon,
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
    }


def _settings(kind: EncoderKind, theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"tie_word_embeddings": True})
    dropout = theirs.get("classifier_dropout")
    if dropout is not None:  # the head here has the dropout of the blocks
        check_config(theirs, {"classifier_dropout": theirs["hidden_dropout_prob"]})
    if kind.offset:  # positions begin behind that of the padding token
        check_config(theirs, {"pad_token_id": kind.offset - 1})
    return {**_objective(kind, theirs), **block_settings(kind, theirs)}


def block_settings(kind: EncoderKind, theirs: Mapping[str, Any]) -> Settings:
    """Returns our keys for embeddings and blocks. Raises ConfigError where there are none."""
    check_config(theirs, {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"})
    return {
        "num_token_types": theirs["type_vocab_size"],
        "num_layers": theirs["num_hidden_layers"],
        "hidden_size": theirs["hidden_size"],
        "num_attention_heads": theirs["num_attention_heads"],
        "intermediate_size": theirs["intermediate_size"],
        "activation": choose(_ACTIVATIONS, theirs, "hidden_act"),
        "max_position_embeddings": theirs["max_position_embeddings"] - kind.offset,
        "norm": "layernorm",
        "layernorm_epsilon": theirs["layer_norm_eps"],
        "pos_emb": "learned",
        "use_bias_in_attn_linear": True,
        "use_bias_in_mlp": True,
        "hidden_dropout": theirs["hidden_dropout_prob"],
        "attention_dropout": theirs["attention_probs_dropout_prob"],
        **({"opt_pos_emb_offset": kind.offset} if kind.offset else {}),
        **({"norm_placement": kind.norm_placement} if kind.norm_placement != "pre" else {}),
        **({"embedding_norm": True} if kind.embedding_norm else {}),
    }


def _objective(kind: EncoderKind, theirs: Mapping[str, Any]) -> Settings:
    """Returns the keys of the objective and its head."""
    heads = {name: head for head, name in kind.classes.items()}
    default = "order" if kind.orders else "masked"
    head = next((heads[name] for name in theirs.get("architectures") or () if name in heads), default)
    if head == "answers":
        return {"train_impl": CLASSES, "num_classes": 1}
    if head == "classes":
        check_config(theirs, {"problem_type": "single_label_classification"})
        labels = _labels(theirs)
        return {"train_impl": CLASSES, "num_classes": len(labels), "task_labels": labels}
    return {"train_impl": MASKED, "pack_impl": "unpacked", "bert_binary_head": head == "order"}


def _labels(theirs: Mapping[str, Any]) -> list[str]:
    """Returns the names of the classes. Raises ConfigError where they are not one text for each number from 0 on."""
    count = theirs.get("num_labels") or 2
    named = theirs.get("id2label") or {str(number): f"LABEL_{number}" for number in range(count)}
    known = named if isinstance(named, Mapping) else {}
    labels = [known.get(str(number)) for number in range(len(named))]
    texts = [label for label in labels if isinstance(label, str)]
    if len(texts) != len(labels) or len(set(texts)) != len(texts) or len(texts) < 2:
        what = "it names no two or more different classes by the numbers from 0 on"
        raise ConfigError.of(what, key="id2label", value=named, location="config.json")
    return texts


def _table(kind: EncoderKind, dims: ModelDims) -> list[TensorMapping]:
    if dims.towers:
        return block_table(kind, dims, {})
    modules = dict(kind.masked)
    if dims.classes:
        modules = dict(kind.classifier if dims.classes > 1 else kind.choice)
    if dims.binary_head:
        modules |= {"pooler": f"{kind.prefix}.pooler.dense", "binary_head": "cls.seq_relationship"}
    rows = block_table(kind, dims, modules)
    return rows if dims.classes else [*rows, same(f"{dims.num_layers + 4}.bias", kind.bias)]


def block_table(kind: EncoderKind, dims: ModelDims, modules: Mapping[str, str]) -> list[TensorMapping]:
    """Returns the rows of embeddings, blocks and linear layers of a head. modules: of the head -> theirs."""
    rows = kind.names.table(dims)
    types = f"{kind.prefix}.embeddings.token_type_embeddings.weight"
    rows.append(same("0.tokentype_embeddings.weight", types))
    named = {f"{dims.num_layers + 4}.{ours}": theirs for ours, theirs in modules.items()}
    named |= {"0.embedding_norm": kind.embedding_norm} if kind.embedding_norm else {}
    for ours, theirs in named.items():
        rows += [same(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]
    return rows


def encoder_names(prefix: str, head: str, *, post: bool) -> Names:
    """Returns the names of tensors outside the heads.

    Args:
        prefix: of its modules.
        head: output matrix.
        post: whether norms are on the residual after each addition.
    """
    return Names(
        embedding=f"{prefix}.embeddings.word_embeddings",
        positions=f"{prefix}.embeddings.position_embeddings",
        block=f"{prefix}.encoder.layer.{{}}.",
        input_norm=None if post else "attention.ln",
        attention=("attention.self.query", "attention.self.key", "attention.self.value"),
        dense="attention.output.dense",
        mlp_norm=None if post else "ln",
        linear1=("intermediate.dense",),
        linear2="output.dense",
        attention_output_norm="attention.output.LayerNorm" if post else None,
        mlp_output_norm="output.LayerNorm" if post else None,
        final_norm=None if post else f"{prefix}.encoder.ln",
        head=head,
    )


def _of(kind: EncoderKind, model_type: str) -> ModelFamily:
    head = kind.names.head
    return ModelFamily(
        name=model_type.replace("-", "_"),
        model_type=model_type,
        architecture=kind.classes["order" if kind.orders else "masked"],
        misfits=partial(_misfits, kind),
        config=partial(_config, kind),
        settings=partial(_settings, kind),
        table=partial(_table, kind),
        spare=("embeddings.position_ids",),
        copies={f"{head}.weight": f"{kind.names.embedding}.weight", f"{head}.bias": kind.bias},
        encoder=True,
        prefix=f"{kind.prefix}.",
        heads=(f"{kind.prefix}.pooler.", "cls.", "lm_head.", "classifier."),
        parts=frozenset({"norm_placement", "embedding_norm"}),
    )


_PREDICTIONS = {
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.layernorm": "cls.predictions.transform.LayerNorm",
}
_POOLED = {"pooler": "bert.pooler.dense", "classifier": "classifier"}
_MEGATRON = EncoderKind(
    label="Megatron-BERT",
    prefix="bert",
    architecture="MegatronBert",
    names=encoder_names("bert", "cls.predictions.decoder", post=False),
    norm_placement="pre",
    masked=_PREDICTIONS,
    bias="cls.predictions.bias",
    classifier=_POOLED,
    choice=_POOLED,
)
_BERT = EncoderKind(
    label="BERT",
    prefix="bert",
    architecture="Bert",
    names=encoder_names("bert", "cls.predictions.decoder", post=True),
    norm_placement="post",
    masked=_PREDICTIONS,
    bias="cls.predictions.bias",
    classifier=_POOLED,
    choice=_POOLED,
    embedding_norm="bert.embeddings.LayerNorm",
)
_ROBERTA = EncoderKind(
    label="RoBERTa",
    prefix="roberta",
    architecture="Roberta",
    names=encoder_names("roberta", "lm_head.decoder", post=True),
    norm_placement="post",
    masked={"lm_head.dense": "lm_head.dense", "lm_head.layernorm": "lm_head.layer_norm"},
    bias="lm_head.bias",
    classifier={"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
    choice={"pooler": "roberta.pooler.dense", "classifier": "classifier"},
    orders=False,
    offset=2,
    embedding_norm="roberta.embeddings.LayerNorm",
)
MEGATRON_BERT = _of(_MEGATRON, "megatron-bert")
BERT = _of(_BERT, "bert")
ROBERTA = _of(_ROBERTA, "roberta")
