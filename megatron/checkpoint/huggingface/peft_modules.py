"""The embedding and the output layer of a model in a folder of `peft`: what of them it holds, and what it cannot hold.

peft calls them `modules_to_save`, keeps them under their names in the model, and puts them in place of the model's.
Where one matrix is both, it is written under both names: peft gives a module that it replaces a matrix of its own, and
the output layer would go on with the base's. Source: peft 0.21, utils/save_and_load.py and utils/other.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.adapter_config import EMBEDDING, HEAD, SAVED, low_rank
from megatron.checkpoint.format import files
from megatron.checkpoint.huggingface.export_model import vocabulary
from megatron.checkpoint.huggingface.family import ModelFamily
from megatron.checkpoint.huggingface.model_folder import CONFIG, HEADS
from megatron.checkpoint.huggingface.safetensors_format import Promise
from megatron.checkpoint.load.adapter_base import frozen_rows, stored_base
from megatron.checkpoint.load.stored_model import StoredModel
from megatron.errors import ConfigError
from megatron.param_table import NAMED_KINDS, ModelDims, TensorShape


@dataclass(frozen=True)
class SavedModules:
    """The matrices of a model that were trained beside adapters."""

    stored: StoredModel
    """The checkpoint."""
    names: tuple[str, ...]
    """Names of `modules_to_save`, those of earlier runs among them."""
    rows: int
    """Rows that are tokens, or those of the base where it has more [tokens]."""
    base_rows: int | None
    """Rows of the base; None where they are not known [tokens]."""

    @staticmethod
    def of(stored: StoredModel, tokens: int | None, base_model: str | None) -> SavedModules:
        """Reads what the checkpoint and the base say.

        Raises ConfigError where the tokenizer has tokens that the base has no rows for, and nothing trained theirs.

        Args:
            stored: The checkpoint.
            tokens: Of the tokenizer; None where it is not known.
            base_model: The base's folder, or a name that says nothing of its rows.
        """
        rows = vocabulary(stored, tokens)
        base, adapter = stored_base(stored.directory), low_rank(stored.model.lora)
        tied = not stored.model.no_weight_tying
        trained = frozenset[str]() if adapter is None else adapter.trained(tied=tied)
        trained = trained if base is None else trained.union(base.trained)
        known = [size for size in (_rows_of(base_model), None if base is None else base.tokens) if size is not None]
        if known and rows > min(known):
            _refuse_new_rows(stored, rows - min(known), frozen_rows(trained, tied=tied))
        rows = min(max([rows, *known]), stored.rows)
        return SavedModules(stored, tuple(name for name in SAVED if name in trained), rows, min(known, default=None))

    @property
    def added(self) -> bool:
        """Whether the base has to be given rows first, as far as that is known."""
        return bool(self.names) and (self.base_rows is None or self.rows > self.base_rows)

    def promises(self, family: ModelFamily, dims: ModelDims, dtype: torch.dtype | None) -> Iterator[Promise]:
        """Their tensors, under every name by which a release of transformers knows them.

        Args:
            family: The family of the model.
            dims: Sizes of the model.
            dtype: Type of the tensors; None for that of the stored embedding.
        """
        if not self.names:
            return
        matrices = {NAMED_KINDS[shape.kind]: shape for shape in self.stored.table if shape.kind in NAMED_KINDS}
        dtype = dtype or self.stored.full_tensor(matrices[EMBEDDING]).dtype
        for name, theirs in self._theirs(family, dims):
            shape = matrices.get(name, matrices[EMBEDDING])
            size = (self.rows, *shape.shape[1:])
            yield Promise(f"base_model.model.{theirs}.weight", size, dtype, partial(self._values, shape, dtype))

    def settings(self, family: ModelFamily, dims: ModelDims) -> dict[str, Any]:
        """What adapter_config.json says of them; nothing where there are none."""
        if not self.names:
            return {}
        modules = [theirs.rpartition(".")[2] for _, theirs in self._theirs(family, dims)]
        return {"modules_to_save": modules, **({"ensure_weight_tying": True} if dims.tied else {})}

    def _theirs(self, family: ModelFamily, dims: ModelDims) -> Iterator[tuple[str, str]]:
        """Our name of each matrix with each name of its module in transformers."""
        keys = {"0.word_embeddings.weight": EMBEDDING, f"{dims.num_layers + 4}.final_linear.weight": HEAD}
        for row in family.table(replace(dims, tied=False)):
            name = keys.get(row.ours)
            if name in self.names:
                spelt = HEADS if row.theirs[0] in HEADS[1:] else row.theirs  # releases call that of GPT-NeoX either
                yield from ((name, family.module_name(theirs).removesuffix(".weight")) for theirs in spelt)

    def _values(self, shape: TensorShape, dtype: torch.dtype) -> Tensor:
        return self.stored.full_tensor(shape, precise=dtype == torch.float32)[: self.rows]


def _rows_of(base_model: str | None) -> int | None:
    """Rows of the embedding of a folder of transformers; None where that is no folder here, or does not say it."""
    path = None if base_model is None else Path(base_model) / CONFIG
    size = files.read_json(path).get("vocab_size") if path is not None and path.is_file() else None
    return size if isinstance(size, int) else None


def _refuse_new_rows(stored: StoredModel, added: int, frozen: list[str]) -> None:
    if not frozen:
        return
    prompt, hint = stored.model.lora is None, "train lora with modules_to_save: [embedding, head]"
    raise ConfigError.of(
        f"the tokenizer has {added:,} tokens that the base model has no rows for, and the new rows of the "
        f"{' and the '.join(frozen)} were not trained: they are in no adapter, and peft would not have them",
        key="soft_prompt_tuning" if prompt else "lora",
        location=str(stored.directory),
        hint=hint if prompt else f"leave --adapter-only out to convert the whole model, or {hint}",
    )
