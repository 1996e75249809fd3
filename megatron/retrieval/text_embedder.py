"""Embeddings of texts by an encoder of transformers: the mean of its last layer over the tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.distributed.process_group import device
from megatron.errors import ConfigError

LONGEST = 256
"""Most tokens of a text that the encoder reads, as in Megatron-LM; fewer where it has fewer positions."""
KEY = "retro_embedder"


class TextEmbedder:
    """An encoder with its tokenizer."""

    def __init__(self, folder: Path) -> None:
        """Loads a folder. Raises ConfigError where transformers cannot read it as an encoder."""
        from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModel.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            what = f"transformers cannot read it: {error}"
            raise ConfigError.of(what, key=KEY, value=str(folder)) from None
        if type(model.config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(model.config, "is_decoder", False):
            what = f"{type(model).__name__} is no encoder"
            raise ConfigError.of(what, key=KEY, value=str(folder), hint="name a BERT, RoBERTa or another encoder")
        self._model = model.eval().to(device())
        positions = getattr(model.config, "max_position_embeddings", None) or LONGEST
        first = getattr(model.embeddings, "padding_idx", None)  # RoBERTa's positions begin behind that of padding
        self._longest = min(LONGEST, positions if first is None else positions - first - 1)
        self.width = int(model.config.hidden_size)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch: int) -> np.ndarray:
        """Returns the embeddings of texts, float32 [n, d]; not a number where a text has no token.

        Args:
            texts: of which the first tokens are read.
            batch: texts of one pass; texts of about the same length are in one, so that few tokens are padding.
        """
        rows = self._tokenizer(list(texts), truncation=True, max_length=self._longest, return_special_tokens_mask=True)
        order = sorted(range(len(texts)), key=lambda number: len(rows["input_ids"][number]))
        found = np.empty((len(texts), self.width), np.float32)
        for start in range(0, len(order), batch):
            own = order[start : start + batch]
            picked = {name: [values[number] for number in own] for name, values in rows.items()}
            inputs = self._tokenizer.pad(picked, return_tensors="pt").to(device())
            inner = (inputs.pop("special_tokens_mask") == 0) & (inputs["attention_mask"] == 1)  # [b, s]
            hidden = self._model(**inputs).last_hidden_state.float()
            found[own] = ((hidden * inner[..., None]).sum(1) / inner.sum(1, keepdim=True)).cpu().numpy()
        return found
