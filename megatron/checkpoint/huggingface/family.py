"""What a family of models in `transformers` is, seen from here: names, rows and settings, in both directions.

A family's file holds one `ModelFamily`. Its table says for every tensor of ours which tensors of theirs hold its values
and how the values are rearranged, so exporting and importing are the two directions of one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.param_table import ModelDims
from megatron.registry import VANILLA

Settings = dict[str, Any]
PARTS: Mapping[str, object] = {
    "norm_placement": "pre",
    "embedding_norm": False,
    "qk_layernorm_across_heads": False,
    "softmax_scale": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "scale_embeddings": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logit_scale": 1.0,
    "layer_types": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "softmax_type": VANILLA,
    "attention_output_gate": False,
    "value_residual": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
}
"""Keys of parts that few families have -> the value of all others."""
QKV_BIAS = "add_qkv_bias"
"""A further such key, whose value elsewhere is that of use_bias_in_attn_linear."""


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of ours and those of theirs that hold the same values."""

    ours: str
    """"<layer>.<name>"."""
    theirs: tuple[str, ...]
    """Names in transformers."""
    apart: Callable[[Tensor], Sequence[Tensor]]
    """Ours -> theirs, in the order of their names; it works on shapes alone too (the meta device)."""
    together: Callable[[Sequence[Tensor]], Tensor]
    """Theirs -> ours."""
    copies: bool = False
    """Their tensors must agree, and ours is any of them."""
    turned: bool = False
    """They keep a matrix as [in, out]."""
    beside: str = ""
    """Another tensor of ours that theirs hold too; that one's row says `written: false`."""
    joined: Callable[[Tensor, Tensor], Sequence[Tensor]] | None = None
    """With `beside`: ours and that one -> theirs, in place of `apart`."""
    written: bool = True
    """Whether an export writes theirs from this row."""


@dataclass(frozen=True)
class ExpertsMapping:
    """How a family says that its blocks have experts."""

    misfits: Callable[[ModelSection, MoeSection], list[ConfigIssue]]
    """What of a moe section its configuration cannot say."""
    config: Callable[[ModelSection, MoeSection], Settings]
    """Our sections -> config.json."""


@dataclass(frozen=True)
class Mixers:
    """How a family says that its blocks have no attention."""

    kinds: frozenset[str]
    """Those it knows."""
    misfits: Callable[[ModelSection, MixersSection], list[ConfigIssue]]
    """What of a mixers section its configuration cannot say."""
    config: Callable[[ModelSection, MixersSection], Settings]
    """Our sections -> config.json."""


@dataclass(frozen=True)
class ModelFamily:
    """One model type of `transformers`."""

    name: str
    """What `--architecture` calls it."""
    model_type: str
    """In config.json."""
    architecture: str
    """In config.json."""
    misfits: Callable[[ModelSection], list[ConfigIssue]]
    """What of a model section their configuration cannot say."""
    config: Callable[[ModelSection, int], Settings]
    """Our section and padded vocabulary -> config.json."""
    settings: Callable[[Mapping[str, Any]], Settings]
    """Config.json -> our keys; raises ConfigError where ours cannot say it."""
    table: Callable[[ModelDims], list[TensorMapping]]
    """All tensors."""
    table_of: Callable[[Mapping[str, Any]], Callable[[ModelDims], list[TensorMapping]]] | None = None
    """Config.json, completed -> the table, where it decides the order of rows; the table above is written."""
    spare: tuple[str, ...] = ()
    """Endings of their names that hold no weights (masks, tables of frequencies) and are left out."""
    parts: frozenset[str] = frozenset()
    """Of the keys above, those that its configuration can say; `misfits` compares their values."""
    spare_blocks: bool = False
    """Whether files may hold blocks behind the last one, which transformers leaves out."""
    spare_modules: tuple[str, ...] = ()
    """Begins of names in files that transformers leaves out, such as those of modules that predict further tokens."""
    class_pads: bool = False
    """Where config.json names no padding token, their class names that of the public models."""
    prefix: str = ""
    """What their names begin with in a model with a head, which files of the bare model lack."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Further names of tensors that the model has once -> their first name."""
    heads: tuple[str, ...] = ()
    """What names of heads begin with, of which a model leaves out those that it has not."""
    modules: str = ""
    """What the names of its modules begin with, where those in files begin with `prefix` and modules otherwise."""
    experts: ExpertsMapping | None = None
    """None where its blocks have none."""
    mixers: Mixers | None = None
    """None where all of them have attention."""
    encoder: bool = False
    """Whether its attention is bidirectional."""
    encoder_decoder: bool = False
    """Whether its blocks are an encoder and a decoder."""
    passages: ModelFamily | None = None
    """That of encoders of passages, where this one's models are encoders of questions."""

    def module_name(self, name: str) -> str:
        """Returns the name that a tensor of its files has in the model, by which peft calls it."""
        known = self.modules and name.startswith(self.prefix)
        return self.modules + name.removeprefix(self.prefix) if known else name

    def file_name(self, name: str) -> str:
        """Returns the name that a tensor of the model has in files."""
        known = self.modules and name.startswith(self.modules)
        return self.prefix + name.removeprefix(self.modules) if known else name


def same(ours: str, theirs: str) -> TensorMapping:
    """The same values in the same order."""
    return TensorMapping(ours, (theirs,), lambda tensor: (tensor,), lambda tensors: tensors[0])


def transposed(ours: str, theirs: str) -> TensorMapping:
    """A matrix that they keep as [in, out]."""
    return TensorMapping(ours, (theirs,), lambda tensor: (tensor.T,), lambda tensors: tensors[0].T, turned=True)


def stacked(ours: str, theirs: tuple[str, ...]) -> TensorMapping:
    """Ours is theirs on top of each other, in equal parts."""
    count = len(theirs)
    return TensorMapping(ours, theirs, lambda tensor: tensor.chunk(count, 0), lambda tensors: torch.cat(tuple(tensors)))


def stacked_transposed(ours: str, theirs: tuple[str, ...]) -> TensorMapping:
    """Ours is theirs, each turned, on top of each other, in equal parts."""
    count = len(theirs)
    return TensorMapping(
        ours,
        theirs,
        lambda tensor: tuple(part.T for part in tensor.chunk(count, 0)),
        lambda tensors: torch.cat(tuple(part.T for part in tensors)),
    )


def halves_swapped(ours: str, theirs: str) -> TensorMapping:
    """Ours is theirs with the second half of the rows first."""

    def swapped(tensor: Tensor) -> Tensor:
        return torch.cat(tensor.chunk(2, 0)[::-1])

    return TensorMapping(ours, (theirs,), lambda tensor: (swapped(tensor),), lambda tensors: swapped(tensors[0]))


def interleaved(row: TensorMapping, head_dim: int) -> TensorMapping:
    """The row of queries, keys and values, where theirs have the two features of a rotated pair side by side.

    The order of features within a head changes no score, as queries and keys have the same.
    """

    def side_by_side(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def half_apart(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    def apart(tensor: Tensor) -> Sequence[Tensor]:
        queries, keys, values = row.apart(tensor)
        return side_by_side(queries), side_by_side(keys), values

    def together(tensors: Sequence[Tensor]) -> Tensor:
        queries, keys, values = tensors
        return row.together((half_apart(queries), half_apart(keys), values))

    return TensorMapping(row.ours, row.theirs, apart, together)


def fused(ours: str, theirs: tuple[str, str, str], dims: ModelDims) -> TensorMapping:
    """Query, key and value projections (weights or biases), which they keep apart."""
    return TensorMapping(
        ours,
        theirs,
        lambda tensor: queries_keys_values(tensor, dims),
        lambda tensors: query_key_value(tensors, dims),
    )


def queries_keys_values(rows: Tensor, dims: ModelDims) -> tuple[Tensor, Tensor, Tensor]:
    """Our rows -> all query rows, all key rows, all value rows, each in order of heads."""
    if dims.grouped:
        queries, keys, values = rows.split((dims.query_size, dims.kv_size, dims.kv_size))
        return queries, keys, values
    by_head = rows.unflatten(0, (dims.num_attention_heads, 3, dims.head_dim))  # [n, 3, d, ...]
    return by_head[:, 0].flatten(0, 1), by_head[:, 1].flatten(0, 1), by_head[:, 2].flatten(0, 1)


def query_key_value(parts: Sequence[Tensor], dims: ModelDims) -> Tensor:
    """The inverse of `queries_keys_values`."""
    if dims.grouped:
        return torch.cat(tuple(parts))
    heads = (dims.num_attention_heads, dims.head_dim)
    return torch.stack([part.unflatten(0, heads) for part in parts], 1).flatten(0, 2)  # [n, 3, d, ...] -> [3nd, ...]


def unlike(
    section: ModelSection | MoeSection | MixersSection, expected: Mapping[str, object], family: str
) -> list[ConfigIssue]:
    """An error for every key of the section whose value is not the one that the family is made of."""
    return [
        ConfigIssue(f"a {family} model has {value!r}", key=key, value=getattr(section, key))
        for key, value in expected.items()
        if getattr(section, key) != value
    ]


def lacking_parts(model: ModelSection, known: frozenset[str], family: str) -> list[ConfigIssue]:
    """An error for every part that the model has and the family has not.

    Args:
        model: The model section.
        known: Keys of the parts that the family can say.
        family: Its name, for messages.
    """
    errors = unlike(model, {key: value for key, value in PARTS.items() if key not in known}, family)
    if QKV_BIAS not in known and model.add_qkv_bias not in (None, model.use_bias_in_attn_linear):
        what = f"a {family} model has biases in all projections of attention, or in none"
        errors.append(ConfigIssue(what, key=QKV_BIAS, value=model.add_qkv_bias))
    return errors


def choose(known: Mapping[str, str], theirs: Mapping[str, Any], key: str) -> str:
    """Our name of what config.json names under `key`. ConfigError when there is none."""
    if theirs.get(key) not in known:
        raise ConfigError.of(
            f"only {', '.join(sorted(known))} can be taken over", key=key, value=theirs.get(key), location="config.json"
        )
    return known[theirs[key]]


def check_config(theirs: Mapping[str, Any], expected: Mapping[str, object]) -> None:
    """Raises ConfigError for keys of config.json whose value asks for something that we have not."""
    ConfigError.raise_any(
        ConfigIssue(f"only {value!r} can be taken over", key=key, value=theirs[key], location="config.json")
        for key, value in expected.items()
        if theirs.get(key, value) not in (value, None)
    )


def special_attention(model: ModelSection, family: str) -> list[ConfigIssue]:
    """An error for every block that does not attend to all earlier positions of its window."""
    others = sorted({str(kind) for kind in model.attention_config or ()} - {"global", "flash"})
    message = f"a {family} model has no blocks of kind {', '.join(others)}"
    return [ConfigIssue(message, key="attention_config", value=others)] if others else []
