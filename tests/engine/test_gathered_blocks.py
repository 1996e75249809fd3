"""Blocks whose parameters ZeRO 3 gathers together train behind a frozen embedding, which gives no gradient back."""

from __future__ import annotations

from tests.end_to_end.engines import Curves, agree, train
from tests.multi_rank import run_distributed
from tests.options import LATENTS, Keys

ADAPTED: Keys = {**LATENTS, "lora": {"rank": 4, "targets": ["dense", "linear1"]}}


def both(rank: int, world_size: int) -> list[Curves]:
    """The curves without ZeRO, and with its stage 3."""
    stages: list[Keys] = [{}, {"zero_optimization": {"stage": 3}}]
    return [train(rank, world_size, {"latents": {**ADAPTED, **stage}}, {}) for stage in stages]


def test_adapters_of_latent_attention_train_under_zero_3() -> None:
    plain, sharded = run_distributed(both, 1)[0]
    agree(sharded, plain)
