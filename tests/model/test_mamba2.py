"""Mamba-2 against a recurrence in float64, transformers' slow path and the formula of its norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer

from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import ParamFactory
from megatron.kernels.ssd import add_state, chunk_scan, one_step, reached
from megatron.model.mixers.mamba2 import GatedNorm, Mamba2TransformerBlock
from megatron.param_table.mixer_dims import Mamba2Dims
from tests.model.mixers import build, disturb


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, step, A, B, C of 2 rows, 6 heads of 4 features in 2 groups, 5 states; decays from almost 1 to almost 0."""
    step, rate = F.softplus(2 * numbers(2, length, 6)), -numbers(6, seed=1).exp()
    x, into, out = (numbers(2, length, *sizes, seed=seed) for seed, sizes in ((2, (6, 4)), (3, (2, 5)), (4, (2, 5))))
    return [value.to(dtype).requires_grad_() for value in (x, step, rate, into, out)]


def loop(values: list[Tensor], state: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Equation 16 of arXiv:2405.21060 with the steps of section 7, position by position."""
    x, step, rate, into, out = values
    rows = []
    for t in range(x.shape[1]):
        if resets is not None:
            state = state * ~resets[:, t, None, None, None]
        fed = (step[:, t].unsqueeze(-1) * x[:, t]).unsqueeze(-1) * into[:, t].repeat_interleave(3, 1).unsqueeze(2)
        state = torch.exp(step[:, t] * rate)[..., None, None] * state + fed
        rows.append((state * out[:, t].repeat_interleave(3, 1).unsqueeze(2)).sum(-1))
    return torch.stack(rows, 1), state


@pytest.mark.parametrize("length", [1, 40, 64, 150])
@pytest.mark.parametrize("apart", [False, True])
def test_chunks_are_the_recurrence(length: int, apart: bool) -> None:
    """Values, the last state and all gradients; documents begin inside chunks, at their edges and one after another."""
    values, state = inputs(length), numbers(2, 6, 4, 5, seed=5).requires_grad_()
    resets = None
    if apart:
        resets = torch.zeros(2, length, dtype=torch.bool)
        resets[0, 0], resets[1, length // 2 :: 64] = True, True
        resets[0, 30:33], resets[1, 128:129] = True, True
    expected = loop(values, state, resets)
    y, last = chunk_scan(*values, resets)
    found = add_state(y, last, state, reached(values[1], values[2], resets), values[4])
    torch.testing.assert_close(found, expected)
    weights = numbers(*y.shape, seed=6), numbers(*last.shape, seed=7)
    gradients = [
        torch.autograd.grad(
            sum((one * weight).sum() for one, weight in zip(results, weights, strict=True)), [*values, state]
        )
        for results in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_chunks_in_fp32_keep_six_digits() -> None:
    """Sums of decays over a chunk reach thousands, and neighbours differ by hundredths."""
    values = [value.detach() for value in inputs(300, torch.float32)]
    values[1][:, ::7] *= 100
    y, last = chunk_scan(*values)
    expected = loop([value.double() for value in values], torch.zeros(2, 6, 4, 5, dtype=torch.float64), None)
    for found, target in zip((y, last), expected, strict=True):
        torch.testing.assert_close(found.double(), target, rtol=1e-5, atol=1e-6 * float(target.abs().max()))


def test_one_position_is_the_recurrence() -> None:
    values, state = inputs(1), numbers(2, 6, 4, 5, seed=5)
    x, step, rate, into, out = values
    y, last = one_step(x[:, 0], step[:, 0], rate, into[:, 0], out[:, 0], state)
    expected = loop(values, state, None)
    torch.testing.assert_close((y.unsqueeze(1), last), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_mixer_is_that_of_transformers(bias: bool) -> None:
    """Their slow path with the same weights, limits of the step in effect."""
    block = build("mamba2", mamba_use_bias_in_linears=bias).sequential[2]
    assert isinstance(block, Mamba2TransformerBlock)
    disturb(block)
    config = Mamba2Config(
        hidden_size=64,
        num_heads=8,
        head_dim=16,
        state_size=12,
        n_groups=2,
        use_bias=bias,
        layer_norm_epsilon=1e-6,
        time_step_limit=(0.01, 0.2),
        num_hidden_layers=1,
        chunk_size=8,
    )
    theirs = TheirMixer(config, 0).eval()
    theirs.load_state_dict(block.mixer.state_dict())
    x = numbers(90, 2, 64).float()
    with torch.no_grad():
        steps = F.softplus(theirs.in_proj(x)[..., -8:] + theirs.dt_bias)
        assert steps.min() < 0.01 < 0.2 < steps.max()
        expected = theirs(x.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(block.mixer(x, None, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", [False, True])
def test_the_norm_is_of_each_group(before: bool) -> None:
    sizes = Mamba2Dims(heads=4, head=4, groups=2, norm_before_gate=before, epsilon=0.1)
    norm = GatedNorm(sizes, ParamFactory(1, 2, Axis("model"), torch.float64))
    with torch.no_grad():
        norm.weight.copy_(numbers(16, seed=3))
    y, gate = numbers(2, 3, 16), numbers(2, 3, 16, seed=1)
    opening = gate * torch.sigmoid(gate)
    value = y if before else y * opening
    scale = (value.unflatten(-1, (2, 8)).square().mean(-1, keepdim=True) + 0.1).rsqrt().expand(2, 3, 2, 8).flatten(2)
    expected = value * scale * norm.weight * (opening if before else 1)
    torch.testing.assert_close(norm(y, gate), expected)


def test_initial_values_are_those_of_the_public_code() -> None:
    """Rates -A uniform from 1 to 16, steps log-uniform from 0.001 to 0.1, D of 1."""
    mixer = build("mamba2", mamba_num_heads=256, mamba_head_dim=2).sequential[2].mixer
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= rates.min() < 1.5 < 15 < rates.max() <= 16
    assert rates.mean().item() == pytest.approx(8.5, abs=1)
    assert 0.001 <= steps.min() < 0.0012 < 0.08 < steps.max() <= 0.1
    assert steps.log().mean().item() == pytest.approx(-4.6, abs=0.3)
    assert bool((mixer.D == 1).all()) and bool((mixer.norm.weight == 1).all())
