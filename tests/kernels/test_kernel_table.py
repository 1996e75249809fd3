"""The table of kernels: which candidate serves an operation, what is asked for by name, and what the plan prints."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.errors import ConfigError
from megatron.kernels import apex
from megatron.kernels.dispatch import choose_kernels
from megatron.kernels.norms import LAYER_NORM, RMS_NORM
from megatron.plan.kernel_choices import kernel_issues, kernel_lines
from megatron.registry import ACTIVATIONS
from megatron.registry.kernels import (
    FUSED_ADAM,
    OPERATIONS,
    TRITON_ACTIVATIONS,
    KernelFacts,
    choose_kernel,
    keys_of_kernels,
)
from megatron.registry.registry import load_target

GPU = KernelFacts("cuda", "bfloat16", activation="swiglu", installed=lambda package: package == "triton")
CPU = replace(GPU, device="cpu")
NOTHING = replace(GPU, installed=lambda package: False)
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "tokenizer_type": "CharLevelTokenizer",
    "train_batch_size": 4,
    "train_iters": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
}


def config(**changes: Any) -> Any:
    return resolve([], {**SMALL, **changes}, Resources(1)).config


@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - {FUSED_ADAM}))
def test_auto_is_fused_on_gpus_and_torch_elsewhere(operation: str) -> None:
    assert choose_kernel(operation, GPU).entry.name == "triton"
    assert choose_kernel(operation, GPU, "torch").entry.name == "torch"
    assert choose_kernel(operation, CPU).entry.name == "torch"
    assert "for GPUs" in choose_kernel(operation, CPU).rejected["triton"]
    assert "pip install neox[triton]" in choose_kernel(operation, NOTHING).rejected["triton"]


def test_torch_compile_fuses_blocks_itself_but_not_the_loss() -> None:
    compiled = replace(GPU, compiled=True)
    assert choose_kernel("rms_norm", compiled).entry.name == "torch"
    assert choose_kernel("cross_entropy", compiled).entry.name == "triton"


def test_a_key_takes_its_kernel_before_the_others() -> None:
    both = replace(GPU, installed=lambda package: True)
    assert choose_kernel("activation", both, asked=["use_flashattn_swiglu"]).entry.name == "flash-attn"
    assert choose_kernel("activation", both).entry.name == "triton"
    assert choose_kernel("rms_norm", both, "torch", ["rmsnorm_fusion"]).entry.name == "triton"
    other = replace(both, activation="gelu")
    assert (
        "the activation is gelu"
        in choose_kernel("activation", other, asked=["use_flashattn_swiglu"]).missing["use_flashattn_swiglu"]
    )


def test_an_activation_of_a_plugin_is_its_own_formula() -> None:
    choice = choose_kernel("activation", replace(GPU, activation="sine"))
    assert choice.entry.name == "torch"
    assert "no kernel of the activation sine" in choice.rejected["triton"]
    assert set(ACTIVATIONS.names) == TRITON_ACTIVATIONS | {"quick_gelu", "quick_geglu", "xielu"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_target_exists(operation: str) -> None:
    for entry in OPERATIONS[operation]:
        if entry.name != "flash-attn":
            assert load_target(entry.target) is not None
    assert callable(load_target("megatron.kernels.flash_attention:flash_swiglu_of"))


def test_apex_serves_where_triton_is_missing() -> None:
    facts = replace(GPU, installed=lambda package: package == "fused_layer_norm_cuda")
    assert choose_kernel("rms_norm", facts).entry.name == "apex"
    assert choose_kernel("layer_norm", facts, asked=["layernorm_fusion"]).entry.name == "apex"
    assert "NVIDIA Apex is not installed" in choose_kernel("rms_norm", NOTHING).rejected["apex"]
    assert choose_kernel("rms_norm", facts, "torch").entry.name == "torch"


@pytest.fixture
def apex_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apex's functions with torch's arithmetic and Apex's arguments."""
    module = ModuleType("apex.normalization.fused_layer_norm")
    functional = torch.nn.functional
    module.fused_rms_norm_affine = lambda x, weight, shape, eps: functional.rms_norm(x, shape, weight, eps)
    module.fused_layer_norm_affine = lambda x, weight, bias, shape, eps: functional.layer_norm(
        x, shape, weight, bias, eps
    )
    module.fused_layer_norm = lambda x, shape, eps: functional.layer_norm(x, shape, None, None, eps)
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("apex_package")
def test_the_norms_of_apex_get_their_arguments() -> None:
    x, weight, bias = torch.randn(3, 5, 16), torch.rand(16), torch.randn(16)
    torch.testing.assert_close(apex.RMS_NORM(x, weight, 1e-6), RMS_NORM(x, weight, 1e-6))
    for parameters in ((weight, bias), (weight, None), (None, None)):
        assert torch.allclose(apex.LAYER_NORM(x, *parameters, 1e-5), LAYER_NORM(x, *parameters, 1e-5))
    residual = torch.randn(3, 5, 16)
    normed, total = apex.LAYER_NORM.of_sum(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, residual + x) and torch.equal(normed, LAYER_NORM(total, weight, bias, 1e-5))


def test_what_is_asked_for_by_name_and_missing_is_an_error_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (issue,) = kernel_issues(config(kernels="triton"), "cpu")
    assert issue.key == "kernels"
    assert "Triton's kernels are for GPUs" in issue.message
    assert "kernels: auto" in (issue.hint or "")
    assert kernel_issues(config(kernels="auto"), "cpu") == []
    asked = config(**dict.fromkeys(keys_of_kernels(), True))
    assert kernel_issues(asked, "cpu") == []  # one file serves a laptop too
    (issue,) = kernel_issues(config(use_flashattn_swiglu=True), "cuda")
    assert (issue.key, issue.hint) == ("use_flashattn_swiglu", "leave it out: triton serves then")
    assert "pip install neox[flash]" in issue.message
    with pytest.raises(ConfigError, match="kernels = 'triton'"):
        choose_kernels(torch.device("cpu"), torch.float32, config(kernels="triton").kernels, "swiglu")


def plain_lines(section: Any, device: str) -> list[str]:
    """The lines of all operations but attention, which tests/kernels/test_attention_backends.py has."""
    lines = kernel_lines(section, device)
    first = next(number for number, line in enumerate(lines) if "attention (" in line)
    return lines[:first]


def test_the_plan_lists_implementations_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert plain_lines(config(), "cpu")[:2] == [
        "torch: rms_norm, activation, rotary, cross_entropy, adam",
        "  no triton: Triton's kernels are for GPUs, and the model is on cpu",
    ]
    with_all = plain_lines(config(hidden_dropout=0.1, moe_num_experts=4, norm="layernorm"), "cuda")
    assert with_all == ["triton: layer_norm, activation, rotary, dropout_add, cross_entropy, permutation"]
    assert plain_lines(config(norm="scalenorm", pos_emb="alibi", kernels="torch"), "cuda") == [
        "torch: activation, cross_entropy, adam"
    ]


def test_a_cpu_takes_the_kernels_of_torch() -> None:
    kernels = choose_kernels(torch.device("cpu"), torch.float32, config().kernels, "swiglu")
    assert kernels.rms_norm is RMS_NORM
