"""Megatron's BERT: `MegatronBertForPreTraining`, or `MegatronBertForMaskedLM` where no order of segments is learned.

A classifier is `MegatronBertForSequenceClassification`, and `MegatronBertForMultipleChoice` with a logit an answer.

Norms are before attention and MLP, and one behind the last block (arXiv:1909.08053, figure 7).
"""

from __future__ import annotations

from collections.abc import Mapping
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
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims

PRETRAINING, MASKED_LM = "MegatronBertForPreTraining", "MegatronBertForMaskedLM"
CLASSIFIER, CHOICE = "MegatronBertForSequenceClassification", "MegatronBertForMultipleChoice"
_ACTIVATIONS = {"gelu": "gelu"}
"""Both activate the layer before the output matrix too, which is gelu here."""


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    expected = {"norm": "layernorm", "pos_emb": "learned", "gpt_j_residual": False, "use_bias_in_norms": True}
    expected |= {"activation": "gelu", "num_kv_heads": model.num_attention_heads, "opt_pos_emb_offset": 0}
    expected |= {"use_bias_in_mlp": True, "use_bias_in_attn_linear": True, "use_qk_layernorm": False}
    expected |= {"norm_placement": "pre", "softmax_scale": None, "scale_embeddings": False, "embedding_multiplier": 1.0}
    expected |= {"residual_multiplier": 1.0, "layer_types": None}
    expected |= {"add_qkv_bias": model.add_qkv_bias if model.add_qkv_bias is not False else None}
    errors = unlike(model, expected, "Megatron-BERT") + special_attention(model, "Megatron-BERT")
    dims = ModelDims.of(model)
    if dims.head_dim * dims.num_attention_heads != dims.hidden_size:
        what = "a Megatron-BERT model has hidden_size / heads"
        errors.append(ConfigIssue(what, key="kv_channels", value=model.kv_channels))
    if not dims.token_types:
        what = "a Megatron-BERT model adds the vectors of token types"
        errors.append(ConfigIssue(what, key="num_token_types", value=0, hint="train it with num_token_types: 2"))
    return errors


def _architecture(model: ModelSection) -> str:
    if model.num_classes is not None:
        return CLASSIFIER if model.num_classes > 1 else CHOICE
    return PRETRAINING if model.bert_binary_head else MASKED_LM


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return {
        "architectures": [_architecture(model)],
        "vocab_size": padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.max_position_embeddings,
        "type_vocab_size": model.num_token_types,
        "hidden_act": "gelu",
        "layer_norm_eps": model.layernorm_epsilon,
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "tie_word_embeddings": True,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True})
    check_config(theirs, {"position_embedding_type": "absolute"})
    return {
        **_objective(theirs),
        "num_token_types": theirs["type_vocab_size"],
        "num_layers": theirs["num_hidden_layers"],
        "hidden_size": theirs["hidden_size"],
        "num_attention_heads": theirs["num_attention_heads"],
        "intermediate_size": theirs["intermediate_size"],
        "activation": choose(_ACTIVATIONS, theirs, "hidden_act"),
        "max_position_embeddings": theirs["max_position_embeddings"],
        "norm": "layernorm",
        "layernorm_epsilon": theirs["layer_norm_eps"],
        "pos_emb": "learned",
        "use_bias_in_attn_linear": True,
        "use_bias_in_mlp": True,
        "hidden_dropout": theirs["hidden_dropout_prob"],
        "attention_dropout": theirs["attention_probs_dropout_prob"],
    }


def _objective(theirs: Mapping[str, Any]) -> Settings:
    """Returns the keys of the objective and its head."""
    classes = theirs.get("architectures") or ()
    if CHOICE in classes:
        return {"train_impl": CLASSES, "num_classes": 1}
    if CLASSIFIER in classes:
        check_config(theirs, {"problem_type": "single_label_classification"})
        names = theirs.get("id2label") or {str(number): f"LABEL_{number}" for number in range(2)}
        labels = [names[str(number)] for number in range(len(names))]
        return {"train_impl": CLASSES, "num_classes": len(labels), "task_labels": labels}
    return {"train_impl": MASKED, "pack_impl": "unpacked", "bert_binary_head": MASKED_LM not in classes}


NAMES = Names(
    embedding="bert.embeddings.word_embeddings",
    positions="bert.embeddings.position_embeddings",
    block="bert.encoder.layer.{}.",
    input_norm="attention.ln",
    attention=("attention.self.query", "attention.self.key", "attention.self.value"),
    dense="attention.output.dense",
    mlp_norm="ln",
    linear1=("intermediate.dense",),
    linear2="output.dense",
    final_norm="bert.encoder.ln",
    head="cls.predictions.decoder",
)


def _table(dims: ModelDims) -> list[TensorMapping]:
    head = f"{dims.num_layers + 4}."
    rows = NAMES.table(dims)
    rows.append(same("0.tokentype_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"))
    if dims.classes:
        modules = {"pooler": "bert.pooler.dense", "classifier": "classifier"}
    else:
        rows.append(same(f"{head}bias", "cls.predictions.bias"))
        modules = {
            "lm_head.dense": "cls.predictions.transform.dense",
            "lm_head.layernorm": "cls.predictions.transform.LayerNorm",
        }
    if dims.binary_head:
        modules |= {"pooler": "bert.pooler.dense", "binary_head": "cls.seq_relationship"}
    for ours, theirs in modules.items():
        rows += [same(f"{head}{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]
    return rows


MEGATRON_BERT = ModelFamily(
    name="megatron_bert",
    model_type="megatron-bert",
    architecture=PRETRAINING,
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=_table,
    spare=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "embeddings.position_ids"),
    encoder=True,
)
