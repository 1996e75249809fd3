"""Growing batches, lengths in samples, and curricula: the arithmetic against counting, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.derived.batch_rampup import BatchRampup
from megatron.config.derived.curriculum import curriculum_lengths
from megatron.errors import ConfigError
from tests.config.small import errors, resolved


def test_the_batch_grows_as_megatron_s_does() -> None:
    """--rampup-batch-size 16 8 300000 to 1024: (1024 - 16) / 8 = 126 stages of 300000 / 126 = 2380.95 samples."""
    ramp = BatchRampup(1024, 16, 8, 300_000)
    assert ramp.stages == 126
    for consumed, size in (
        (0, 16),
        (2380, 16),
        (2381, 24),
        (4761, 24),
        (4762, 32),
        (297_619, 1008),
        (297_620, 1016),
        (300_000, 1024),
    ):
        assert ramp.size(consumed) == size, consumed


def test_steps_and_samples_agree_with_counting() -> None:
    ramp = BatchRampup(32, 8, 4, 100)
    consumed, sizes = 0, []
    for step in range(20):
        assert ramp.consumed(step) == consumed
        assert ramp.steps(consumed) == step
        assert ramp.steps(consumed + ramp.size(consumed) - 1) == step
        sizes.append(ramp.size(consumed))
        consumed += sizes[-1]
    assert sizes[0] == 8
    assert sizes[-1] == 32
    assert sorted(sizes) == sizes
    assert set(sizes) <= set(ramp.sizes())
    assert BatchRampup.of(32, None).consumed(5) == 160


@pytest.mark.parametrize(
    ("ramp", "reported"),
    [
        ([8, 8], "not three counts"),
        ([8, 0, 100], "not three counts"),
        ([8, 7, 100], r"from 8 in steps of 7 there is no way to train_batch_size = 32"),
        ([64, 8, 100], "no way"),
        ([2, 2, 100], r"2 samples is not whole micro batches of 4 on 1 data-parallel"),
    ],
)
def test_illegal_growth_is_refused(ramp: list[int], reported: str) -> None:
    sizes = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": None}
    with pytest.raises(ConfigError, match=reported):
        resolved(rampup_batch_size=ramp, **sizes)
    assert resolved(rampup_batch_size=[8, 8, 100], **sizes).config.training.rampup_batch_size == (8, 8, 100)


def test_a_run_in_samples_decays_over_samples() -> None:
    samples = {"train_iters": None, "train_samples": 1000, "lr_decay_iters": None}
    assert resolved(**samples).config.schedule.lr_decay_samples == 1000
    assert resolved(**samples, lr_decay_fraction=0.5).config.schedule.lr_decay_samples == 500
    assert resolved(**samples, lr_decay_samples=700).config.schedule.lr_decay_samples == 700
    with pytest.raises(ConfigError, match=r"lr_decay_iters = 5.*give lr_decay_samples"):
        resolved(**{**samples, "lr_decay_iters": 5})
    with pytest.raises(ConfigError, match=r"lr_decay_samples = 5.*not given in samples"):
        resolved(lr_decay_samples=5)
    with pytest.raises(ConfigError, match=r"warmup_iters = 5.*counts samples"):
        resolved(**samples, warmup_iters=5)
    with pytest.raises(ConfigError, match=r"both given"):
        resolved(**{**samples, "train_iters": 10})


def block(**more: Any) -> dict[str, Any]:
    return {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 32,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 100, "difficulty_step": 8},
        **more,
    }


def test_lengths_grow_as_deepspeed_s_did() -> None:
    linear = curriculum_lengths(block(), 64)
    assert [linear(step) for step in (1, 33, 34, 66, 67, 99, 100, 500)] == [8, 8, 16, 16, 24, 24, 32, 32]
    settings = {"total_curriculum_step": 100, "difficulty_step": 1, "root_degree": 2}
    root = curriculum_lengths(block(schedule_type="fixed_root", schedule_config=settings), 64)
    assert [root(step) for step in (25, 100)] == [20, 32]
    steps = {"difficulty": [8, 16, 64], "max_step": [5, 10]}
    discrete = curriculum_lengths(block(schedule_type="fixed_discrete", schedule_config=steps), 64)
    assert [discrete(step) for step in (1, 5, 6, 10, 11, 99)] == [8, 8, 16, 16, 64, 64]
    assert curriculum_lengths(None, 64)(1) == curriculum_lengths(block(enabled=False), 64)(1) == 64


@pytest.mark.parametrize(
    ("wrong", "reported"),
    [
        ({"curriculum_type": "voc"}, "no curriculum over 'voc'"),
        ({"schedule_type": "custom"}, "do not make a schedule"),
        ({"schedule_config": {"total_curriculum_step": 5}}, r"lacks \['difficulty_step'\]"),
        ({"max_difficulty": 10_000}, "seq_length"),
        ({"min_difficulty": 4}, "below difficulty_step"),
        ({"min_dificulty": 4}, "no min_dificulty in this block.*min_difficulty"),
        ({"min_difficulty": "8"}, "whole numbers"),
    ],
)
def test_wrong_curricula_are_refused(wrong: dict[str, Any], reported: str) -> None:
    with pytest.raises(ConfigError, match=reported):
        resolved(curriculum_learning=block(**wrong))


def test_deepspeed_s_own_sampling_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"data_efficiency.*curriculum_learning"):
        resolved(data_efficiency={"enabled": True})


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        (
            {"lr_decay_iters": 2, "warmup_iters": 5},
            "the warmup is 5 steps long and the decay ends at 2 (lr",
        ),
        ({"train_iters": 10, "warmup_iters": 20}, "the warmup is 20 steps long and the decay ends at 10"),
        ({"train_iters": 10, "warmup_iters": 10}, "the warmup is 10 steps long"),
        ({"warmup": 1.0}, "the warmup is 100 steps long and the decay ends at 100"),
        ({"train_iters": None, "train_samples": 50, "warmup": 1.0}, "the warmup is 50 samples long and the decay ends"),
    ],
)
def test_a_warmup_ends_before_the_horizon(changes: dict[str, Any], reported: str) -> None:
    assert any(reported in line for line in errors(**changes))
    assert errors(train_iters=10, warmup_iters=9) == []


def test_a_part_above_one_is_offered_in_steps_only_where_it_is_full() -> None:
    assert any("or write warmup_iters: 20" in line for line in errors(warmup=20))
    assert not any("warmup_iters" in line for line in errors(warmup=1.5))
