"""The DeepSpeed configuration, read back by DeepSpeed's own parser where that needs no device."""

from typing import Any

import pytest

from megatron.config.deepspeed_config import deepspeed_config
from megatron.errors import ConfigError
from tests.config.small import resolved


def settings(world_size: int = 1, **changes: Any) -> dict[str, Any]:
    return deepspeed_config(resolved(world_size, **changes).config)


def test_batch_and_clipping() -> None:
    plain = settings(2, train_batch_size=8)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [plain[name] for name in sizes] == [8, 2, 2]
    assert plain["gradient_clipping"] == 0.0
    assert plain["zero_optimization"]["stage"] == 0
    assert "optimizer" not in plain
    assert "scheduler" not in settings(scheduler={"type": "WarmupLR", "params": {}})
    assert settings(zero_optimization={"stage": 2}, gradient_clipping=0.5)["gradient_clipping"] == 0.5


def test_number_formats() -> None:
    bfloat16 = settings(precision="bfloat16")
    assert bfloat16["bf16"] == {"enabled": True}
    assert bfloat16["data_types"] == {"grad_accum_dtype": "fp32"}
    assert bfloat16["zero_optimization"]["stage"] == 1
    half = settings(fp16={"fp16": True, "enabled": True, "loss_scale": 0})
    assert half["fp16"] == {"enabled": True, "loss_scale": 0}
    assert "bf16" not in half
    assert settings(fp32_allreduce=True)["communication_data_type"] == "fp32"


def test_blocks_are_handed_on_and_defaults_left_out() -> None:
    assert settings(comms_logger={"enabled": True})["comms_logger"] == {"enabled": True}
    assert "comms_logger" not in settings()
    assert settings(deepspeed_extra_args={"zero_force_ds_cpu_optimizer": False})["zero_force_ds_cpu_optimizer"] is False


def test_deepspeed_prints_its_own_line_only_where_that_is_asked_for() -> None:
    assert settings()["steps_per_print"] is None
    assert settings(steps_per_print=10)["steps_per_print"] is None
    assert settings(steps_per_print=100)["steps_per_print"] == 100
    assert settings(wall_clock_breakdown=True)["steps_per_print"] == 10


def test_a_timer_that_waits_for_the_device_runs_only_where_its_line_is_printed() -> None:
    off = {"throughput": {"enabled": False}}
    on = {"throughput": {"enabled": True}}
    assert settings()["timers"] == off
    assert "timers" not in settings(steps_per_print=100)
    assert "timers" not in settings(wall_clock_breakdown=True)
    assert settings(deepspeed_extra_args={"timers": on})["timers"] == on


def test_extra_args_may_add_but_not_change() -> None:
    assert settings(deepspeed_extra_args={"train_batch_size": 2})["train_batch_size"] == 2
    with pytest.raises(ConfigError, match="train_batch_size = 99 contradicts train_batch_size = 2"):
        settings(deepspeed_extra_args={"train_batch_size": 99})
