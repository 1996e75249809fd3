"""A gated delta net is that of transformers' Qwen3-Next, forward and backward, and starts as that does.

Another order of heads, a wrong decay, length, norm or gate breaks this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from tests.model.mixers import build

HIDDEN, KEY_HEADS, RATIO, KEY, VALUE, LENGTH = 64, 2, 2, 8, 12, 75
PARTS = (KEY, KEY, RATIO * VALUE, RATIO * VALUE)
"""Rows of a key head in their projection: query, key, values, gates."""


def theirs() -> Qwen3NextGatedDeltaNet:
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=KEY_HEADS,
        linear_num_value_heads=RATIO * KEY_HEADS,
        linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE,
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(1)
    module = Qwen3NextGatedDeltaNet(config, 0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.3)
            if name == "A_log":  # slow decays, so that states, and not their rounding, are what the norm sees
                parameter -= 2
    return module


def ours(values: Any) -> Tensor:
    """Their two projections, a matrix or its gradient each, as the one of ours."""
    joint, small = values
    by_head = joint.view(KEY_HEADS, sum(PARTS), HIDDEN).split(PARTS, dim=1)
    scalars = small.view(KEY_HEADS, 2, RATIO, HIDDEN).unbind(1)
    return torch.cat([part.flatten(0, 1) for part in (*by_head, *scalars)])


def test_it_is_that_of_transformers() -> None:
    other, block = theirs(), build("gated_delta_net").sequential[2]
    net: Any = block.attention
    with torch.no_grad():
        net.in_proj.weight.copy_(ours((other.in_proj_qkvz.weight, other.in_proj_ba.weight)))
        net.conv1d.weight.copy_(other.conv1d.weight)
        for mine, source in (
            (net.A_log, other.A_log),
            (net.dt_bias, other.dt_bias),
            (net.norm.scale, other.norm.weight),
            (net.dense.weight, other.out_proj.weight),
        ):
            mine.copy_(source)
    x = torch.randn(2, LENGTH, HIDDEN, requires_grad=True)
    expected, found = other(x), net(x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(expected)
    names = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    projections = (other.in_proj_qkvz.weight, other.in_proj_ba.weight)
    reference = torch.autograd.grad(
        expected, [x, *projections, *(other.get_parameter(name) for name in names)], direction
    )
    mine = [net.conv1d.weight, net.A_log, net.dt_bias, net.norm.scale, net.dense.weight]
    grads = torch.autograd.grad(found, [x, net.in_proj.weight, *mine], direction)
    for gradient, target in zip(grads, (reference[0], ours(reference[1:3]), *reference[3:]), strict=True):
        torch.testing.assert_close(gradient, target, rtol=1e-4, atol=1e-4 * target.abs().max().item())


def test_rates_and_steps_start_as_the_public_ones() -> None:
    net: Any = build("gated_delta_net").sequential[2].attention
    assert bool((net.dt_bias == 1).all() and (net.norm.scale == 1).all())
    rates = net.A_log.exp()
    assert 0.01 <= rates.min() < rates.max() <= 16
    decays = -rates * F.softplus(net.dt_bias)
    assert decays.max() < 0
