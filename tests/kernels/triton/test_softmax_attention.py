"""Attention through Triton's softmax, in its interpreter, against plain attention in float64: values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.kernels.attention import plain_attention
from megatron.kernels.attention_patterns import AttentionMask, Window
from megatron.kernels.softmax_attention import softmax_attention
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.registry.attention import SOFTMAX_KEYS
from tests.kernels.triton.compared import DTYPES, TOLERANCE, random, worst
from tests.model.sections import disturb, initialization_section, model_section

HEADS, KV_HEADS, LENGTH, SIZE = 4, 2, 19, 8
STARTS = torch.tensor([[0] * 7 + [7] + [8] * 11, [0] * 19])
BIAS = -torch.linspace(0.1, 1.0, HEADS)[:, None] * torch.arange(LENGTH)
CASES: dict[str, tuple[Tensor | None, AttentionMask | None]] = {
    "causal": (None, None),
    "documents": (STARTS, None),
    "window": (None, AttentionMask(Window(5))),
    "documents in a window": (STARTS, AttentionMask(Window(5))),
    "bias": (None, AttentionMask(None, BIAS)),
    "bias of documents in a window": (STARTS, AttentionMask(Window(4), BIAS)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_is_plain_attention(case: str, dtype: torch.dtype) -> None:
    """Scores and weights are rounded to the type: some units of it over the sums of a row."""
    starts, view = CASES[case]
    shapes = [(2, HEADS, LENGTH, SIZE), (2, KV_HEADS, LENGTH, SIZE), (2, KV_HEADS, LENGTH, SIZE)]
    parts = tuple(random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    difference = worst(
        lambda *qkv: softmax_attention(*qkv, 0.0, starts, view),
        lambda *qkv: plain_attention(*qkv, 0.0, starts, view),
        parts,
    )
    assert difference < 8 * TOLERANCE[dtype]


def test_cached_keys() -> None:
    q, k = random(1, HEADS, 3, SIZE, dtype=torch.float32), random(1, KV_HEADS, 11, SIZE, dtype=torch.float32, seed=1)
    torch.testing.assert_close(softmax_attention(q, k, k), plain_attention(q, k, k))


def test_fp16_scores_beyond_its_range_before_scaling_stay_finite() -> None:
    q = torch.full((1, 1, 2, 64), 40.0, dtype=torch.float16)
    assert (q[0, 0, 0].double() @ q[0, 0, 0].double()).item() > 65504
    assert softmax_attention(q, q, q).isfinite().all()


def test_dropout_drops_and_keeps_the_mean() -> None:
    q = random(4, 8, 64, 16, dtype=torch.float32)
    torch.manual_seed(0)
    out = softmax_attention(q, q, torch.ones_like(q), 0.25)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.std() > 0.01


@pytest.mark.parametrize("key", SOFTMAX_KEYS)
@pytest.mark.parametrize("positions", ["rotary", "alibi", "rpe"])
def test_a_key_puts_it_into_the_global_blocks_of_a_model(key: str, positions: str) -> None:
    """Loss and gradients of a model of both kinds are those of the model without the key."""
    section = model_section(pos_emb=positions, attention_config=("global", "flash"))
    models = []
    for keys in ({"kernels": "triton", key: True}, {"kernels": "torch"}):
        spec = ModelSpec(
            section,
            initialization_section(init_method_std=0.2),
            SimpleNamespace(**keys),
            padded_vocab_size=96,
            topology=Topology.single(),
            seed=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
            reset_attention=True,
        )
        models.append(SequentialModel(build_layer_specs(spec)))
        disturb(models[-1])
    fused, plain = models
    assert fused.sequential[2].attention.attend is softmax_attention
    assert fused.sequential[3].attention.attend is plain.sequential[3].attention.attend is not softmax_attention
    tokens = torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    found = []
    for model in models:
        loss = model(tokens, None, STARTS).float().square().mean()
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
