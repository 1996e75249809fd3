"""Which optimizer may name what, and in which layout it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.errors import ConfigError
from megatron.registry import EIGHT_BIT, OPTIMIZERS
from tests.config.small import resolved

VALUES: dict[str, Any] = {
    "betas": [0.9, 0.99],
    "freeze_step": 5,
    "slow_warmup": 5,
    "precondition_frequency": 5,
    "max_dim": 5,
    "ns_steps": 5,
    "adjust_lr_fn": "original",
    "beta2_decay": -0.8,
    "comm_backend_name": "nccl",
    "momentum": 0.9,
    **dict.fromkeys(("split_experts", "split_qkv", "normuon"), True),
    "start_step": 3,
    "block_size": 64,
    "graft": "sgd",
    "split_heads": False,
    "ns_coefficients": "polar_express",
    "normuon_beta2": 0.0,
    "momentum_dtype": "bfloat16",
}


def chosen(name: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": {"lr": 1e-3, **params}}}


@pytest.mark.parametrize("name", OPTIMIZERS.names)
def test_every_setting_is_taken_and_any_other_is_named(name: str) -> None:
    settings = OPTIMIZERS.entry(name).settings
    for setting in settings:
        value = VALUES.get(setting, setting in {"torch_adam", "nesterov"} or 0.5)
        value = True if setting in {"bias_correction", "adam_w_mode", "amsgrad", "cuda_aware"} else value
        value = False if setting == "nesterov" and name == "sgd" else value
        found = resolved(use_bias_in_attn_linear=False, **chosen(name, **{setting: value}))
        assert found.config.optimizer.optimizer_type == name
    with pytest.raises(ConfigError, match=f"{name} has no parameter warp"):
        resolved(**chosen(name, warp=1))


@pytest.mark.parametrize(
    ("params", "reported"),
    [
        ({"momentum": "0.9"}, "momentum = '0.9' is not a finite number"),
        ({"momentum": 1.5}, r"momentum = 1.5 is not in \[0, 1\)"),
        ({"nesterov": 1}, "neither true nor false"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"momentun": 0.9}, "did you mean momentum"),
    ],
)
def test_wrong_values_are_reported(params: dict[str, Any], reported: str) -> None:
    with pytest.raises(ConfigError, match=reported):
        resolved(**chosen("sgd", **params))


@pytest.mark.parametrize("name", ["sm3", "adafactor", "soap", "shampoo", "muon", "onebitadam"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_needs_full_tensors_or_own_gradients_is_refused_under_zero(name: str, stage: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name} .* ZeRO stage {stage}.*stage: 0"):
        resolved(zero_optimization={"stage": stage}, **chosen(name))
    if name == "muon":
        return
    reported = f"{name} works on full fp32 tensors"
    with pytest.raises(ConfigError, match=reported):
        resolved(precision="bfloat16", zero_optimization={"stage": 0}, **chosen(name))


def test_muon_in_bfloat16_is_legal_in_every_layout_at_zero_1() -> None:
    low = {"precision": "bfloat16", "zero_optimization": {"stage": 1}}
    layouts: list[dict[str, Any]] = [{}, {"pipe_parallel_size": 1}, {"model_parallel_size": 2}, {"log_grad_norm": True}]
    for layout in layouts:
        resolved(world_size=2, **{**low, **layout}, **chosen("muon", nesterov=False, ns_steps=4))
    host = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    for keys, reported in (
        ({"zero_optimization": {"stage": 2}}, "muon needs ZeRO stage 1"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "gradients summed in fp32"),
        ({"zero_optimization": host}, "leave offload_optimizer out"),
    ):
        with pytest.raises(ConfigError, match=reported):
            resolved(**{**low, **keys}, **chosen("muon"))


@pytest.mark.parametrize(
    ("params", "reported"),
    [
        ({"split_heads": True}, "split_heads has an effect with split_qkv only"),
        ({"normuon_beta2": 0.9}, "normuon_beta2 has an effect with normuon only"),
        ({"normuon": True, "adjust_lr_fn": "original"}, "leave adjust_lr_fn out"),
        ({"ns_coefficients": "polar"}, "the choices are standard, polar_express"),
        ({"qk_clip_threshold": 100.0}, "use_bias_in_attn_linear = True: qk_clip_threshold scales weights"),
        ({"qk_clip_threshold": -1.0}, "not above 0"),
        ({"momentum_dtype": "fp16"}, "the choices are fp32, bfloat16"),
    ],
)
def test_options_of_muon_that_do_not_go_together_are_reported(params: dict[str, Any], reported: str) -> None:
    with pytest.raises(ConfigError, match=reported):
        resolved(**chosen("muon", **params))


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_muon_takes_experts_of_several_ranks_apart(precision: str) -> None:
    keys = {
        "precision": precision,
        "zero_optimization": {"stage": 1 if precision == "bfloat16" else 0},
        "moe_num_experts": 4,
        "moe_expert_parallel_size": 2,
    }
    resolved(world_size=2, **keys, **chosen("muon", split_experts=True))
    with pytest.raises(ConfigError, match=r"muon takes the experts of a block for one matrix.*split_experts: true"):
        resolved(world_size=2, **keys, **chosen("muon"))
    with pytest.raises(ConfigError, match=r"experts are sharded over ranks"):
        resolved(world_size=2, **{**keys, "precision": "fp32", "zero_optimization": {"stage": 0}}, **chosen("sm3"))


def test_an_optimizer_of_the_host_needs_its_memory() -> None:
    with pytest.raises(ConfigError, match=r"cpu_adam updates in the host's memory.*offload_optimizer"):
        resolved(accelerator="cuda", **chosen("cpu_adam"))
    offloaded = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    resolved(accelerator="cuda", zero_optimization=offloaded, **chosen("cpu_adam"))
    resolved(**chosen("cpu_adam"))


def test_eight_bits_are_for_some() -> None:
    for name in EIGHT_BIT.names:
        resolved(use_bnb_optimizer=True, **chosen(name))
    with pytest.raises(ConfigError, match=r"bitsandbytes has no muon.*adam, lion, sgd"):
        resolved(use_bnb_optimizer=True, **chosen("muon"))
    with pytest.raises(ConfigError, match=r"8-bit adam has no parameter amsgrad"):
        resolved(use_bnb_optimizer=True, **chosen("adam", amsgrad=True))


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"ema_decay": 1.0}, r"ema_decay = 1.0: the decay is not between 0 and 1"),
        ({"ema_decay": 0.9, **chosen("schedulefree")}, "schedulefree averages the weights itself"),
    ],
)
def test_an_average_of_the_weights_needs_a_decay_and_another_optimizer(settings: dict[str, Any], reported: str) -> None:
    with pytest.raises(ConfigError, match=reported):
        resolved(**settings)


@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, chosen("schedulefree")])
def test_weights_on_a_disk_have_no_average(settings: dict[str, Any]) -> None:
    offload = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
    with pytest.raises(ConfigError, match="on a disk"):
        resolved(zero_optimization=offload, **settings)
