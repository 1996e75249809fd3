"""Which backend serves attention, why the others do not, and what the plan says of it."""

from __future__ import annotations

from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.errors import ConfigError
from megatron.kernels.attention import cpu_attention, cudnn_attention, sdpa_attention
from megatron.kernels.dispatch import load_attention
from megatron.plan.kernel_choices import kernel_choices, kernel_figures, kernel_issues, kernel_lines, kinds_with_scores
from megatron.plan.report import make_plan
from megatron.registry import kernels as table
from megatron.registry.attention import (
    ATTENTION_BACKENDS,
    SOFTMAX_KEYS,
    choose_backend,
)
from megatron.registry.attention_facts import AttentionFacts, torch_version
from megatron.registry.kernels import KernelFacts, is_installed
from megatron.registry.registry import load_target
from tests.kernels.test_kernel_table import SMALL

EVERYTHING = KernelFacts("cuda", "bfloat16", installed=lambda package: True)
HOPPER = AttentionFacts(EVERYTHING, capability=(9, 0), torch=(2, 13))
AMPERE = replace(HOPPER, capability=(8, 0))
BLACKWELL = replace(HOPPER, capability=(10, 0))
LACKING = replace(HOPPER, kernels=replace(EVERYTHING, installed=lambda package: package == "triton"))
CPU = replace(HOPPER, kernels=replace(EVERYTHING, device="cpu", dtype="float32"), capability=None)

# facts, what serves blocks of kind global, what serves those of kind flash
SERVED: dict[str, tuple[AttentionFacts, str, str]] = {
    "Hopper": (HOPPER, "cudnn", "flash-attn 3"),
    "Blackwell": (BLACKWELL, "cudnn", "flash-attn 4"),
    "Ampere": (AMPERE, "torch flash", "flash-attn 2"),
    "consumer Blackwell": (replace(HOPPER, capability=(12, 0)), "torch flash", "flash-attn 2"),
    "unknown GPU": (replace(HOPPER, capability=None), "torch flash", "flash-attn 2"),
    "Turing": (replace(HOPPER, capability=(7, 5)), "torch", "torch"),
    "no package": (LACKING, "cudnn", "cudnn"),
    "fp32": (replace(HOPPER, kernels=replace(EVERYTHING, dtype="float32")), "torch", "torch"),
    "CPU": (CPU, "cpu blocks", "cpu blocks"),
    "CPU, compiled": (replace(CPU, kernels=replace(CPU.kernels, compiled=True)), "torch", "torch"),
    "documents": (replace(HOPPER, documents=True), "torch varlen", "flash-attn 3"),
    "documents, older torch": (replace(HOPPER, documents=True, torch=(2, 9)), "flash-attn 3", "flash-attn 3"),
    "documents, no torch here": (replace(HOPPER, documents=True, torch=None), "torch varlen", "flash-attn 3"),
    "documents, older torch, no package": (replace(LACKING, documents=True, torch=(2, 9)), "flex", "flex"),
    "documents and dropout": (replace(HOPPER, documents=True, dropout=True), "flash-attn 2", "flash-attn 2"),
    "documents and dropout, no package": (replace(LACKING, documents=True, dropout=True), "torch", "torch"),
    "documents, compiled": (
        replace(HOPPER, documents=True, kernels=replace(EVERYTHING, compiled=True)),
        "torch",
        "torch",
    ),
    "compiled": (replace(HOPPER, kernels=replace(EVERYTHING, compiled=True)), "cudnn", "flash-attn 3"),
    "window": (replace(HOPPER, window=True), "torch varlen", "flash-attn 3"),
    "ALiBi": (replace(HOPPER, bias="linear"), "flash-attn 2", "flash-attn 2"),
    "ALiBi, no package": (replace(LACKING, bias="linear"), "flex", "flex"),
    "learned biases": (replace(HOPPER, bias="table", documents=True), "flex", "flex"),
    "learned biases, dropout": (replace(HOPPER, bias="table", dropout=True), "torch", "torch"),
    "dropout": (replace(HOPPER, dropout=True), "cudnn", "flash-attn 2"),
    "deterministic": (replace(HOPPER, deterministic=True), "torch flash", "flash-attn 3"),
    "heads of 192": (replace(HOPPER, head_size=192), "torch flash", "flash-attn 3"),
    "heads of 20": (replace(HOPPER, head_size=20), "torch flash", "flash-attn 2"),
    "heads of 320": (replace(HOPPER, head_size=320), "torch", "torch"),
    "heads of 8, documents, no package": (replace(LACKING, head_size=4, documents=True), "torch", "torch"),
}


@pytest.mark.parametrize("case", SERVED)
def test_what_serves(case: str) -> None:
    facts, plain, flash = SERVED[case]
    found = {kind: choose_backend(facts.for_kind(kind)).entry.name for kind in ("global", "flash")}
    assert found == {"global": plain, "flash": flash}


def test_layouts_are_for_flexible_attention() -> None:
    assert choose_backend(replace(HOPPER, window=True).for_kind("bigbird")).entry.name == "flex"
    assert choose_backend(replace(HOPPER, dropout=True).for_kind("local")).entry.name == "torch"
    assert choose_backend(CPU.for_kind("local")).entry.name == "cpu blocks"
    rejected = choose_backend(HOPPER.for_kind("bigbird")).rejected
    assert "no layout of blocks, as bigbird asks for" in rejected["flash-attn 2"]


def test_with_torch_the_package_serves_only_blocks_that_name_it() -> None:
    facts = replace(HOPPER, documents=True, dropout=True)
    assert choose_backend(facts, "torch").entry.name == "torch"
    assert choose_backend(facts.for_kind("flash"), "torch").entry.name == "flash-attn 2"


REASONS = {
    "flash-attn 2": {
        "for GPUs, and the model is on cpu": CPU,
        "fp16 and bfloat16, and the model is in float32": SERVED["fp32"][0],
        "capability 8.0 or later, not 7.5": SERVED["Turing"][0],
        "at most 256 features, not 320": SERVED["heads of 320"][0],
        "no biases of scores": SERVED["learned biases"][0],
        "torch.compile makes one graph": SERVED["documents, compiled"][0],
        "flash-attn is not installed (pip install neox[flash])": LACKING,
    },
    "flash-attn 3": {
        "capability 9.x, not 8.0": AMPERE,
        "capability 9.x, not one that is not known": replace(HOPPER, capability=None),
        "no dropout": SERVED["dropout"][0],
        "flash-attn-3 is not installed": LACKING,
        "not deterministic for heads": replace(HOPPER, deterministic=True, head_size=256),
        "no biases of scores": SERVED["ALiBi"][0],
    },
    "flash-attn 4": {
        "capability 10.x, not 9.0": replace(HOPPER, dropout=True),
        "at most 128": replace(BLACKWELL, head_size=192),
        "cannot hold it": replace(BLACKWELL, kernels=replace(EVERYTHING, compiled=True)),
    },
    "cudnn": {
        "no documents (reset_attention_mask)": replace(HOPPER, documents=True),
        "no sliding window": replace(HOPPER, window=True),
        "not deterministic": replace(HOPPER, deterministic=True),
    },
    "torch varlen": {"multiple of 8 features, not 20": replace(HOPPER, documents=True, head_size=20)},
    "flex": {"the causal mask alone is faster": replace(LACKING, head_size=320)},
}


@pytest.mark.parametrize(("backend", "reason"), [(name, reason) for name in REASONS for reason in REASONS[name]])
def test_each_rejection_says_why(backend: str, reason: str) -> None:
    facts = REASONS[backend][reason]
    entry = next(entry for entry in ATTENTION_BACKENDS if entry.name == backend)
    assert reason in str(entry.unavailable(facts.for_kind("flash")))


@pytest.mark.parametrize("key", SOFTMAX_KEYS)
def test_the_softmax_keys_ask_for_global_blocks_on_gpus(key: str) -> None:
    assert choose_backend(HOPPER, asked=[key]).entry.name == "triton softmax"
    assert choose_backend(replace(HOPPER, documents=True), "torch", [key]).entry.name == "triton softmax"
    assert choose_backend(HOPPER.for_kind("flash"), asked=[key]).missing == {}
    long = choose_backend(replace(HOPPER, length=20000), asked=[key])
    assert (long.entry.name, list(long.missing)) == ("cudnn", [key])
    assert "at most 16384 keys" in long.missing[key]
    assert "for GPUs" in choose_backend(CPU, asked=[key]).rejected["triton softmax"]


@pytest.mark.parametrize("entry", ATTENTION_BACKENDS, ids=lambda entry: entry.name)
def test_every_target_exists(entry: Any) -> None:
    assert callable(load_target(entry.target))


def config(**changes: Any) -> Any:
    return resolve([], {**SMALL, **changes}, Resources(1)).config


def test_a_key_that_cannot_serve_is_an_error_on_a_gpu_only() -> None:
    long = config(scaled_masked_softmax_fusion=True, seq_length=20000, max_position_embeddings=20000)
    (issue,) = kernel_issues(long, "cuda")
    assert issue.key == "scaled_masked_softmax_fusion"
    assert "16384 keys, and seq_length is 20000" in issue.message
    assert issue.hint == "leave it out: torch serves then"
    assert kernel_issues(long, "cpu") == []
    facts = AttentionFacts(replace(EVERYTHING, dtype="float64"), torch=(2, 13))
    with pytest.raises(ConfigError, match="Triton's kernels compute in fp32, and the model is in float64"):
        load_attention(facts, ["global"], long.kernels)


def test_a_model_gets_what_is_chosen() -> None:
    assert load_attention(CPU, ["global", "local"], None) == {"global": cpu_attention, "local": cpu_attention}
    assert load_attention(HOPPER, ["global"], None) == {"global": cudnn_attention}
    assert load_attention(SERVED["fp32"][0], ["flash"], None) == {"flash": sdpa_attention}


def test_the_plan_says_what_serves_and_why_not_the_package() -> None:
    keys = {"attention_config": [[["global", "flash"], 1]], "precision": "bfloat16", "reset_attention_mask": True}
    lines = kernel_lines(config(**keys), "cuda")
    text = " ".join(" ".join(lines).split())
    assert "torch varlen: attention (global), attention (flash)" in text
    assert "no flash-attn 2: the package flash-attn is not installed (pip install neox[flash])" in text
    assert max(map(len, lines)) <= 100
    assert "cpu blocks: attention (global), attention (flash)" in kernel_lines(config(**keys), "cpu")
    found = kernel_choices(config(precision="bfloat16"), "cuda")
    served = {name: choice.entry.name for name, choice in found.items() if name.startswith("attention")}
    assert served == {
        "attention (global, capability 8.0, 12.0)": "torch flash",
        "attention (global, capability 9.0, 10.0)": "cudnn",
    }
    figures = kernel_figures(config(**keys), "cpu")["attention (flash)"]
    assert figures["served_by"] == "cpu blocks"
    assert "for GPUs" in figures["rejected"]["flash-attn 2"]


def test_transformer_engine_serves_where_it_is_asked_for() -> None:
    lines = kernel_lines(config(te_mha=True, precision="bfloat16"), "cuda")
    assert "transformer engine: attention (global)" in lines
    assert "cpu blocks: attention (global)" in kernel_lines(config(te_mha=True), "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_names_the_ring(device: str) -> None:
    """It serves in place of every backend, and saves no scores, whatever would be asked for on one rank."""
    keys = {"context_parallel_size": 2, "attention_config": [[["global", "flash"], 1]]}
    for method, served in (("ring", {"ring"}), ("ulysses", {"cpu blocks"} if device == "cpu" else {"torch"})):
        values = {**SMALL, **keys, "context_parallel_method": method}
        section = resolve([], values, Resources(2, device)).config
        found = kernel_choices(section, device)
        assert {choice.entry.name for name, choice in found.items() if name.startswith("attention")} == served
        assert kinds_with_scores(section, device) == set()


def test_the_plan_counts_the_probabilities_of_the_softmax() -> None:
    """Per block heads x s^2 values of two bytes, and copies of queries, keys and values."""
    asks = {"scaled_upper_triang_masked_softmax_fusion": True}
    keys: dict[str, Any] = {"precision": "bfloat16", "tokenizer_type": "CharLevelTokenizer", "seq_length": 512}
    found = []
    for more in ({}, asks):
        resolution = resolve([], {**SMALL, **keys, **more, "max_position_embeddings": 512}, Resources(1, "cuda"))
        assert kinds_with_scores(resolution.config, "cuda") == ({"global"} if more else set())
        assert kinds_with_scores(resolution.config, "cpu") == set()
        memory = make_plan(resolution).memory
        assert memory is not None
        found.append(memory.activations)
    batch, length, hidden, heads, blocks = 4, 512, 64, 4, 2
    squares = batch * heads * length**2 * 2
    copies = batch * length * (8 * hidden - 7 * hidden) * 2 - batch * length * heads * 4
    assert found[1] - found[0] == blocks * (squares + copies)


@pytest.mark.parametrize("has_code", [True, False])
def test_a_folder_of_another_distribution_is_no_package(has_code: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 4 alone leaves a folder flash_attn without code of version 2."""
    spec = ModuleSpec("flash_attn", None, origin="x/__init__.py" if has_code else None, is_package=True)
    monkeypatch.setattr(table, "find_spec", lambda package: spec)
    assert is_installed("flash_attn") is has_code
    assert is_installed("flash-attn-4") is False
    assert is_installed("pydantic-core") is True


def test_a_plan_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    assert (torch_version() or ())[0] >= 2
    monkeypatch.setattr("megatron.registry.attention_facts.version", missing)
    assert torch_version() is None
    assert AttentionFacts(EVERYTHING).torch is None


def test_torch_is_asked_for_cudnn_first() -> None:
    """The order holds inside the call only."""
    orders = []
    original = torch.nn.functional.scaled_dot_product_attention

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        orders.append(torch._C._get_sdp_priority_order()[:2])
        return original(*args, **kwargs)

    q = torch.randn(1, 2, 8, 16)
    before = torch._C._get_sdp_priority_order()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        for name in ("cudnn", "torch flash"):
            entry = next(entry for entry in ATTENTION_BACKENDS if entry.name == name)
            torch.testing.assert_close(load_target(entry.target)(q, q, q, 0.0), sdpa_attention(q, q, q))
    backend = torch.nn.attention.SDPBackend
    assert orders[0][0] == int(backend.CUDNN_ATTENTION)
    assert orders[2][0] == int(backend.FLASH_ATTENTION)
    assert torch._C._get_sdp_priority_order() == before
