"""Apex's Adam: its arguments, its arithmetic beside torch's AdamW, and its state in checkpoints.

The package is a stand-in (apex_package.py).
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from megatron.distributed.mesh import Topology
from megatron.errors import ConfigError
from megatron.optim import adam
from megatron.optim.builder_args import OptimizerArgs
from megatron.optim.param_groups import parameter_groups
from megatron.optim.skip_update import skips_on_device
from megatron.optim.state_io import read_state, write_state
from megatron.plan.kernel_choices import kernel_issues, kernel_lines
from megatron.registry.kernels import KernelFacts, choose_kernel
from megatron.registry.registry import load_target
from tests.config.small import resolved
from tests.kernels.test_kernel_table import config
from tests.optim import apex_package
from tests.optim.test_optimizers import DECAY, LR, gradients, parameters, rate

GPU = KernelFacts("cuda", "bfloat16", installed=lambda package: package in ("apex", "amp_C"))
SETTINGS = {"betas": [0.9, 0.95], "eps": 1e-6}


@pytest.fixture
def apex_kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The table's choice where the package is installed."""
    for name, module in apex_package.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    choice = choose_kernel("adam", GPU, asked=["use_apex_adam"])
    assert choice.entry.name == "apex"
    return load_target(choice.entry.target)


def built(params: list[Parameter], kernel: Any, **settings: Any) -> torch.optim.Optimizer:
    args = OptimizerArgs(LR, Topology.single(), {**SETTINGS, **settings}, kernel=kernel)
    return adam.build(parameter_groups(params, DECAY), args)


def run(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for parameter, gradient in zip(params, gradients(step, params), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "settings",
    [{}, {"adam_w_mode": False}, {"bias_correction": False}, {"adam_w_mode": False, "bias_correction": False}],
    ids=str,
)
def test_five_steps_are_those_of_torch_s_adam(settings: dict[str, Any], apex_kernel: Any) -> None:
    """fp32 beside fp32: 1e-6 of weights around 1, where a step is 1e-2."""
    mine, theirs = parameters(), parameters()
    run(built(mine, apex_kernel, **settings), mine, range(5))
    run(built(theirs, None, **settings), theirs, range(5))
    for got, expected in zip(mine, theirs, strict=True):
        assert got.detach() == pytest.approx(expected.detach(), abs=1e-6)


@pytest.mark.parametrize("apex_first", [True, False])
def test_state_goes_from_one_adam_to_the_other_and_back(apex_first: bool, apex_kernel: Any) -> None:
    """Three steps of one, its state as a checkpoint stores it, then two steps of the other: five steps of torch's."""
    kernels = [apex_kernel, None] if apex_first else [None, apex_kernel]
    params, expected = parameters(), parameters()
    run(built(expected, None), expected, range(5))
    first, second = (built(params, kernel) for kernel in kernels)
    run(first, params, range(3))
    for parameter in params:
        found = read_state(first, parameter)
        assert (found.step, set(found.elementwise), found.tensor_level) == (3, {"exp_avg", "exp_avg_sq"}, {})
        write_state(second, parameter, type(found)(3, {name: one.clone() for name, one in found.elementwise.items()}))
    run(second, params, range(3, 5))
    for got, other in zip(params, expected, strict=True):
        assert read_state(second, got).step == 5
        assert got.detach() == pytest.approx(other.detach(), abs=1e-6)


def test_an_update_that_is_left_out_is_not_counted(apex_kernel: Any) -> None:
    """Where the gradients of a step are dropped, neither weights nor counts change."""
    params = parameters()
    optimizer = built(params, apex_kernel)
    run(optimizer, params, range(2))
    before = [parameter.detach().clone() for parameter in params]
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, params, strict=True))
    assert {read_state(optimizer, parameter).step for parameter in params} == {2}
    run(optimizer, params, range(2, 5))
    assert {read_state(optimizer, parameter).step for parameter in params} == {5}


def test_updates_are_not_skipped_by_a_flag_that_apex_does_not_read(apex_kernel: Any) -> None:
    assert not skips_on_device(built(parameters(), apex_kernel))
    assert skips_on_device(built(parameters(), None))


def test_it_serves_only_where_it_is_asked_for() -> None:
    assert choose_kernel("adam", GPU).entry.name == "torch"
    assert choose_kernel("adam", GPU, "triton").entry.name == "torch"
    assert choose_kernel("adam", GPU, "triton").missing == {}
    without = KernelFacts("cuda", "bfloat16", installed=lambda package: package == "apex")
    choice = choose_kernel("adam", without, asked=["use_apex_adam"])
    assert choice.entry.name == "torch"
    assert "CUDA extensions" in choice.missing["use_apex_adam"]


def test_asked_for_and_missing_is_an_error_on_gpus() -> None:
    asked = config(use_apex_adam=True)
    (issue,) = kernel_issues(asked, "cuda")
    assert (issue.key, issue.hint) == ("use_apex_adam", "leave it out: torch serves then")
    assert "NVIDIA Apex is not installed with its CUDA extensions" in issue.message
    assert kernel_issues(asked, "cpu") == []  # one file serves a laptop too
    lines = kernel_lines(asked, "cpu")
    assert any("no apex: Apex is for GPUs, and the model is on cpu" in line for line in lines)


def test_what_apex_lacks_is_refused() -> None:
    amsgrad = {"type": "Adam", "params": {"lr": 1e-3, "amsgrad": True}}
    with pytest.raises(ConfigError, match=r"Apex's Adam has no amsgrad.*use_apex_adam|use_apex_adam.*no amsgrad"):
        resolved(use_apex_adam=True, optimizer=amsgrad)
    with pytest.raises(ConfigError, match="Apex's Adam has no 8-bit state"):
        resolved(use_apex_adam=True, use_bnb_optimizer=True)
    offloaded = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(ConfigError, match="kernel for the host's memory, which offload_optimizer uses"):
        resolved(use_apex_adam=True, zero_optimization=offloaded)
    resolved(use_apex_adam=True)
