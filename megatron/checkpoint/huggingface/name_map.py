"""The tensors of a decoder under our names and a family's: what every family's table has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.checkpoint.huggingface.family import (
    TensorMapping,
    fused,
    halves_swapped,
    interleaved,
    queries_keys_values,
    query_key_value,
    same,
    stacked,
    transposed,
)
from megatron.param_table import ModelDims


@dataclass(frozen=True)
class Names:
    """What a family calls its tensors; projections and norms without the .weight or .bias at the end."""

    embedding: str
    """Word embedding."""
    block: str
    """What the names inside a block begin with; {} stands for its number."""
    input_norm: str | None
    """Norm in front of the attention, if any."""
    attention: tuple[str, ...]
    """One projection for queries, keys and values together, or three."""
    dense: str
    """Output projection of the attention."""
    mlp_norm: str | None
    """Norm in front of the MLP; None where there is none, or the first one serves both."""
    linear1: tuple[str, ...]
    """One matrix, or its plain half and the one that the activation sees."""
    linear2: str
    """Second projection of the MLP."""
    final_norm: str | None
    """Norm behind the last block, if any."""
    head: str
    """Output layer."""
    positions: str | None = None
    """Learned positions, if any."""
    by_head: bool = True
    """Where it is one, its rows stand head by head as ours do, not all queries first."""
    attention_output_norm: str | None = None
    """Norm on what the attention gives, if any."""
    mlp_output_norm: str | None = None
    """Norm on what the MLP gives, if any."""
    gate_first: bool = False
    """Their one matrix in front of a gated activation has the half that it sees first."""
    pairs_interleaved: bool = False
    """Their rotary positions turn neighbouring features; ours turn those half a head apart."""
    norm_values: tuple[tuple[str, str], ...] = (("weight", "weight"), ("bias", "bias"))
    """Our and their names of what a norm holds."""
    matrices_turned: bool = False
    """They keep matrices as [in, out]."""
    projections: Callable[[ModelDims, str, str], list[TensorMapping]] | None = None
    """(dimensions, begin of our names, of theirs) -> the rows of queries, keys and values, where these are no joint or
    three projections."""
    mixer: Callable[[ModelDims, int, str, str], list[TensorMapping] | None] | None = None
    """(dimensions, number of a block, begin of our names, of theirs) -> the rows of what a block has in place of
    attention, or None for attention."""
    head_norms: tuple[str, str] | None = None
    """Those of queries and of keys."""
    experts: Callable[[ModelDims, str, str], list[TensorMapping]] | None = None
    """(dimensions, begin of our names, of theirs) -> the rows of a block's experts, where the family has them."""

    def table(self, dims: ModelDims) -> list[TensorMapping]:
        """Every tensor of a model of those dimensions."""
        rows = [same("0.word_embeddings.weight", f"{self.embedding}.weight")]
        if self.positions is not None:
            rows.append(same("0.position_embeddings.weight", f"{self.positions}.weight"))
        for number in range(dims.num_layers):
            rows += self._block(dims, number, f"{number + 2}.", self.block.format(number))
        last = dims.num_layers + 3
        if self.final_norm is not None:
            rows += [same(f"{last}.norm.{ours}", f"{self.final_norm}.{theirs}") for ours, theirs in self.norm_values]
        if not dims.tied and not dims.classes and not dims.towers:
            rows.append(same(f"{last + 1}.final_linear.weight", f"{self.head}.weight"))
        for depth in range(dims.mtp_layers):
            rows += self._further_token(dims, f"{last + 2 + depth}.", self.block.format(dims.num_layers + depth))
        return rows

    def _further_token(self, dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
        """A module that predicts further tokens, as DeepSeek-V3 has it behind its last block."""
        rows = [same(f"{ours}eh_proj.weight", f"{theirs}eh_proj.weight")]
        names = {"enorm": "enorm", "hnorm": "hnorm", "norm": "shared_head.norm"}
        for name, other in names.items():
            rows += [same(f"{ours}{name}.{mine}", f"{theirs}{other}.{it}") for mine, it in self.norm_values]
        return rows + self._block(dims, dims.num_layers - 1, f"{ours}block.", theirs)

    def _block(self, dims: ModelDims, number: int, ours: str, theirs: str) -> list[TensorMapping]:
        mixer = None if self.mixer is None else self.mixer(dims, number, ours, theirs)
        rows = self._norms(dims, ours, theirs) + (self._attention(dims, ours, theirs) if mixer is None else mixer)
        if self.experts is not None and dims.has_experts(number):
            return rows + self.experts(dims, ours, theirs)
        for kind in ("weight", "bias") if dims.mlp_bias else ("weight",):
            names = tuple(f"{theirs}{name}.{kind}" for name in self.linear1)
            ours_first = f"{ours}mlp.linear1.{kind}"
            rows.append(self._first(ours_first, names))
            rows.append(self._linear(f"{ours}mlp.linear2.{kind}", f"{theirs}{self.linear2}.{kind}"))
        return rows

    def _attention(self, dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
        """The norms of heads, and the projections before and after the attention."""
        rows = []
        if dims.qk_norm and self.head_norms is not None:
            for name, other in zip(("q_layernorm", "k_layernorm"), self.head_norms, strict=True):
                rows += [
                    same(f"{ours}attention.{name}.{mine}", f"{theirs}{other}.{it}") for mine, it in self.norm_values
                ]
        rows += self.projections(dims, ours, theirs) if self.projections else []
        for kind in ("weight", "bias"):
            if self.projections is None and (kind == "weight" or dims.has_qkv_bias):
                names = tuple(f"{theirs}{name}.{kind}" for name in self.attention)
                rows.append(self._projection(dims, f"{ours}attention.query_key_value.{kind}", names))
            if kind == "weight" or dims.attention_bias:
                rows.append(self._linear(f"{ours}attention.dense.{kind}", f"{theirs}{self.dense}.{kind}"))
        return rows

    def _norms(self, dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
        """The norms before attention and MLP, and those on what these give.

        With gpt_j_tied one is before both, which they keep twice, or once.
        """
        rows = []
        names = {
            "input_layernorm": self.input_norm,
            "post_attention_layernorm": self.mlp_norm,
            "attention_output_layernorm": self.attention_output_norm,
            "mlp_output_layernorm": self.mlp_output_norm,
        }
        for value, other in self.norm_values:
            if dims.shared_norm and self.mlp_norm is not None:
                both = (f"{theirs}{self.input_norm}.{other}", f"{theirs}{self.mlp_norm}.{other}")
                rows.append(_twice(f"{ours}input_layernorm.{value}", both))
                continue
            rows += [same(f"{ours}{mine}.{value}", f"{theirs}{name}.{other}") for mine, name in names.items() if name]
        return rows

    def _projection(self, dims: ModelDims, ours: str, theirs: tuple[str, ...]) -> TensorMapping:
        if len(theirs) > 1:
            queries, keys, values = theirs
            row = fused(ours, (queries, keys, values), dims)
            return interleaved(row, dims.head_dim) if self.pairs_interleaved else row
        return same(ours, theirs[0]) if self.by_head else self._queries_first(dims, ours, theirs[0])

    def _queries_first(self, dims: ModelDims, ours: str, theirs: str) -> TensorMapping:
        """Our rows [3h, ...] <-> all queries, all keys, all values."""

        def apart(tensor: Tensor) -> Sequence[Tensor]:
            return (self._turned(torch.cat(queries_keys_values(tensor, dims))),)

        def together(tensors: Sequence[Tensor]) -> Tensor:
            sizes = (dims.query_size, dims.kv_size, dims.kv_size)
            return query_key_value(self._turned(tensors[0]).split(sizes), dims)

        turned = self.matrices_turned and ours.endswith(".weight")
        return TensorMapping(ours, (theirs,), apart, together, turned=turned)

    def _first(self, ours: str, theirs: tuple[str, ...]) -> TensorMapping:
        """The layer in front of the activation, whose plain half is first in ours."""
        if len(theirs) > 1:
            return stacked(ours, theirs)
        return halves_swapped(ours, theirs[0]) if self.gate_first else self._linear(ours, theirs[0])

    def _linear(self, ours: str, theirs: str) -> TensorMapping:
        turned = self.matrices_turned and ours.endswith(".weight")
        return transposed(ours, theirs) if turned else same(ours, theirs)

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.matrices_turned and tensor.dim() == 2 else tensor


def _twice(ours: str, theirs: tuple[str, str]) -> TensorMapping:
    return TensorMapping(ours, theirs, lambda tensor: (tensor, tensor), lambda tensors: tensors[0], copies=True)
