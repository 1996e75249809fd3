"""Does a loaded model say what the saved one said? Its scores of a fixed input are kept with the checkpoint.

Weights that were damaged in memory, cut wrongly or given to a model of other settings (an epsilon, a base of rotary
positions) have the right names and shapes; their scores tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.checkpoint.format import files, layout
from megatron.errors import RunError
from megatron.log import get_logger

_log = get_logger(__name__)

_LENGTH = 32  # tokens
_STRIDE = 7919  # a prime, so that the tokens are spread over the vocabulary
_TOLERANCE = {"fp32": 1e-4, "bfloat16": 5e-2, "fp16": 5e-3}
"""Largest difference that another layout makes, as a part of the largest score."""


class Scoring(Protocol):
    """An engine that scores tokens [b, s] -> fp32 [b, s, v]; collective."""

    def logits(self, tokens: Tensor) -> Tensor: ...


def answers(engine: Scoring, *, length: int, vocabulary: int, precision: str) -> dict[str, Any]:
    """A fixed input and what the model says to it. Collective.

    Args:
        engine: The loaded engine.
        length: Of its sequences; vocabulary [tokens].
        vocabulary: Tokens of the vocabulary, without padding.
        precision: Name of the run's precision.
    """
    tokens = (torch.arange(min(length, _LENGTH)) * _STRIDE % vocabulary)[None]
    return {"tokens": tokens, "logits": engine.logits(tokens).detach().cpu(), "precision": precision}


def compare(directory: Path, engine: Scoring, precision: str) -> None:
    """Asks the loaded model the same; collective. precision: of the model.

    RunError where the logits differ. A checkpoint without stored logits gets a warning. Rows of padding that
    the vocabulary has gained are left out.
    """
    path = directory / layout.ANSWERS
    if not path.is_file():
        _log.warning("%s keeps no logits to compare the loaded model with", directory)
        return
    stored = files.read_tensors(path)
    then = stored["logits"]
    now = engine.logits(stored["tokens"]).detach().cpu()[..., : then.shape[-1]]
    largest = float(then.abs().max())
    furthest = float((now - then).abs().max()) / largest
    tolerance_dtype = max((precision, stored["precision"]), key=_TOLERANCE.__getitem__)
    if not furthest <= _TOLERANCE[tolerance_dtype]:
        raise RunError.of(
            f"the loaded model's logits differ from those at saving by up to {furthest:.2g} of the largest "
            f"({_TOLERANCE[tolerance_dtype]:g} is allowed in {tolerance_dtype})",
            location=str(path),
            hint="give the model's own settings, or leave checkpoint_validation_with_forward_pass out",
        )
    _log.info("the loaded model says what the saved one said: logits within %.1e of the largest", furthest)
