"""Whole models through Triton's kernels, in its interpreter, against the same through torch's operators."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.moe.losses import RouterLossTracker
from megatron.model.sequential_model import SequentialModel
from tests.model.mixtures import moe_section
from tests.model.sections import LLAMA, disturb, initialization_section, model_section

VOCABULARY, LENGTH, BATCH = 96, 12, 2
CASES: dict[str, dict[str, Any]] = {
    "NeoX": {"pos_emb": "rotary", "rotary_pct": 0.5, "gpt_j_residual": True},
    "Llama": {**LLAMA, "pos_emb": "rotary", "num_kv_heads": 2},
    "tied, gelu by tanh": {"pos_emb": "learned", "activation": "gelu_tanh", "no_weight_tying": False},
    "norms of queries and keys": {**LLAMA, "pos_emb": "rotary", "use_qk_layernorm": True},
    "without parameters in norms": {"norm": "non_parametric_layernorm", "pos_emb": "alibi", "activation": "geglu"},
    "experts": {**LLAMA, "pos_emb": "rotary"},
}


def build(name: str, kernels: str) -> SequentialModel:
    moe = moe_section(moe_num_experts=4, moe_top_k=2) if name == "experts" else None
    specs = build_layer_specs(
        ModelSpec(
            model_section(**CASES[name]),
            initialization_section(init_method_std=0.2),
            SimpleNamespace(kernels=kernels),
            padded_vocab_size=VOCABULARY,
            topology=Topology.single(),
            seed=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
            reset_attention=True,
            reset_positions=True,
            moe=moe,
            router_losses=RouterLossTracker(0.01, 0.001) if moe else None,
        )
    )
    model = SequentialModel(specs)
    disturb(model)
    return model


def results(model: SequentialModel) -> dict[str, Tensor]:
    """The loss, the logits and every gradient, on two documents a sequence."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    starts = torch.where(torch.arange(LENGTH) < 5, 0, 5).expand(BATCH, LENGTH)
    weights = torch.full((LENGTH, BATCH), 1 / (LENGTH * BATCH))
    weights[3] = 0.0
    loss = model(tokens, None, starts, TokenTargets(tokens.t(), weights, VOCABULARY - 3))
    loss.backward()
    with torch.no_grad():
        logits = model(tokens, None, starts)
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach(), "logits": logits, **gradients}


@pytest.mark.parametrize("name", CASES)
def test_fused_models_compute_the_same(name: str) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    fused, plain = (results(build(name, kernels)) for kernels in ("triton", "torch"))
    assert fused.keys() == plain.keys()
    for key, expected in plain.items():
        scale = max(1e-3, expected.abs().max().item())
        assert (fused[key] - expected).abs().max().item() < 1e-5 * scale + 1e-7, key


def test_the_kernels_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.kernels.triton import runtime

    launched: list[str] = []
    original = runtime.launch

    def noted(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(kernel.__name__)
        original(kernel, *args, **kwargs)

    monkeypatch.setattr(runtime, "launch", noted)
    results(build("Llama", "triton"))
    assert {"norm_forward", "norm_backward", "activation_forward", "activation_backward", "rotate"} <= set(launched)
    assert {"log_sum_exp", "softmax_gradient"} <= set(launched)
    launched.clear()
    results(build("experts", "triton"))
    assert {"gather_rows", "sum_rows", "row_products"} <= set(launched)
