"""Options of Muon: separate matrices in one weight, coefficients, NorMuon, momentum in bfloat16.

The references are float64 loops over separate matrices; iterations in float64 take the kernel's place, except where the
iterations themselves are compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.param_attrs import HeadLayout, mark_experts, mark_heads, mark_sharded
from megatron.kernels.newton_schulz import (
    POLAR_EXPRESS,
    STANDARD,
    Coefficients,
    NewtonSchulz,
    coefficients,
    orthogonalize,
)
from megatron.optim import muon
from megatron.optim.builder_args import OptimizerArgs
from megatron.optim.muon_step import MOMENTUM
from megatron.optim.param_groups import parameter_groups
from megatron.optim.state_io import read_state, write_state

STEPS, LR, DECAY, COLUMNS = 50, 1.0e-2, 0.1, 12
Q, K, V = 0, 1, 2


def in_float64(matrix: Tensor, iterations: Coefficients) -> Tensor:
    """The iterations, in float64."""
    x = matrix.double()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in iterations:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def gradient(step: int, rows: int) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(step))


def stepped(parameter: Parameter, settings: dict[str, Any], kernel: Any = None, steps: int = STEPS) -> Any:
    args = OptimizerArgs(LR, Topology.single(), settings, kernel=kernel or NewtonSchulz(in_float64))
    optimizer = muon.build(parameter_groups([parameter], DECAY), args)
    for step in range(steps):
        parameter.grad = gradient(step, parameter.shape[0])
        optimizer.step()
    return optimizer


def reference(weight: Tensor, rows: list[list[int]], *, name: str = STANDARD, row_beta: float | None = None) -> Tensor:
    """The weight after all steps, in float64; each of the sets of rows is a matrix."""
    weight, momentum = weight.detach().double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    moments = torch.zeros(len(weight), dtype=torch.float64)
    for step in range(STEPS):
        slope = gradient(step, len(weight)).double()
        momentum = 0.95 * momentum + 0.05 * slope
        ahead = 0.05 * slope + 0.95 * momentum
        weight *= 1 - LR * DECAY
        for chosen in rows:
            update = in_float64(ahead[chosen], coefficients(name, 5))
            if row_beta is None:
                update *= 0.2 * max(update.shape) ** 0.5
            else:
                moments[chosen] = row_beta * moments[chosen] + (1 - row_beta) * update.square().mean(1)
                update = update / (moments[chosen].sqrt().unsqueeze(1) + 1e-8)
                update *= 0.2 * update.numel() ** 0.5 / update.norm()
            weight[chosen] -= LR * update
    return weight


def joint(queries: int, keys: int, head_dim: int, grouped: bool) -> tuple[Parameter, dict[tuple[int, int], list[int]]]:
    """The joint weight, and the rows of each head by (role, number)."""
    parameter = Parameter(torch.randn((queries + 2 * keys) * head_dim, COLUMNS, generator=torch.Generator()))
    mark_heads(parameter, HeadLayout(queries, keys, head_dim, grouped))
    if grouped:
        heads = [(Q, n) for n in range(queries)] + [(role, n) for role in (K, V) for n in range(keys)]
    else:
        heads = [(role, n) for n in range(queries) for role in (Q, K, V)]
    return parameter, {head: list(range(at * head_dim, (at + 1) * head_dim)) for at, head in enumerate(heads)}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_queries_keys_and_values_are_matrices_apart(grouped: bool, heads: bool) -> None:
    parameter, rows = joint(4, 2 if grouped else 4, 3, grouped)
    roles = [[row for head, found in rows.items() if head[0] == role for row in found] for role in (Q, K, V)]
    expected = reference(parameter, list(rows.values()) if heads else roles)
    joined = reference(parameter, [list(range(len(parameter)))])
    stepped(parameter, {"split_qkv": True, "split_heads": heads})
    assert parameter.detach().double() == pytest.approx(expected, abs=1e-5)
    assert not torch.allclose(joined, expected, atol=1e-2)


@pytest.mark.parametrize("expert_ranks", [1, 2])
def test_experts_are_matrices_apart(expert_ranks: int) -> None:
    """Of eight experts a rank has all or four."""
    count = 8 // expert_ranks
    parameter = Parameter(torch.randn(count * 5, COLUMNS, generator=torch.Generator()))
    mark_sharded(parameter, 0, (5,) * 8)
    mark_experts(parameter, Axis("expert", expert_ranks))
    expected = reference(parameter, [list(range(5 * n, 5 * n + 5)) for n in range(count)])
    stepped(parameter, {"split_experts": True})
    assert parameter.detach().double() == pytest.approx(expected, abs=1e-5)


def test_normuon_is_that_of_the_paper() -> None:
    parameter, rows = joint(4, 4, 3, False)
    roles = [[row for head, found in rows.items() if head[0] == role for row in found] for role in (Q, K, V)]
    expected = reference(parameter, roles, row_beta=0.9)
    stepped(parameter, {"split_qkv": True, "normuon": True, "normuon_beta2": 0.9})
    assert parameter.detach().double() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("steps", "largest"), [(5, 0.155), (6, 0.013), (8, 0.011), (12, 0.011)])
def test_polar_express_brings_singular_values_near_one(steps: int, largest: float) -> None:
    """From 0.001 to 1 five leave 0.124 (arXiv:2505.16932), 0.154 where all but the last are damped by 1 %."""
    values = torch.logspace(-3, 0, 500, dtype=torch.float64)
    errors = {}
    for name in (STANDARD, POLAR_EXPRESS):
        x = values
        for a, b, c in coefficients(name, steps):
            x = a * x + b * x**3 + c * x**5
        errors[name] = (x - 1).abs().max().item()
    assert errors[POLAR_EXPRESS] < largest
    assert errors[STANDARD] > 0.2


@pytest.mark.parametrize("name", [STANDARD, POLAR_EXPRESS])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (2, 30, 20)], ids=str)
def test_plain_iterations_are_those_of_float64(name: str, shape: tuple[int, ...]) -> None:
    """bfloat16 has 8 bits: 4 % of the values of a semi-orthogonal matrix."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found, expected = orthogonalize(matrix, coefficients(name, 5)), in_float64(matrix, coefficients(name, 5))
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 0.04 * expected.norm()


def test_the_coefficients_of_a_run_are_used() -> None:
    weights = [Parameter(torch.ones(9, COLUMNS)) for _ in range(2)]
    stepped(weights[0], {"ns_coefficients": POLAR_EXPRESS})
    assert weights[0].detach().double() == pytest.approx(
        reference(weights[1], [list(range(9))], name=POLAR_EXPRESS), abs=1e-5
    )


def test_momentum_in_bfloat16_goes_on_from_a_checkpoint_bit_by_bit() -> None:
    """A checkpoint holds it in fp32."""
    full, resumed = (Parameter(torch.ones(9, COLUMNS)) for _ in range(2))
    settings = {"momentum_dtype": "bfloat16"}
    stepped(full, settings)
    optimizer = stepped(resumed, settings, steps=20)
    state = read_state(optimizer, resumed)
    assert state.elementwise[MOMENTUM].dtype == torch.bfloat16
    state.elementwise[MOMENTUM] = state.elementwise[MOMENTUM].float()
    args = OptimizerArgs(LR, Topology.single(), settings, kernel=NewtonSchulz(in_float64))
    again = muon.build(parameter_groups([resumed], DECAY), args)
    write_state(again, resumed, state)
    for step in range(20, STEPS):
        resumed.grad = gradient(step, 9)
        again.step()
    assert torch.equal(full, resumed)
    exact = reference(torch.ones(9, COLUMNS), [list(range(9))])
    assert (full.detach().double() - exact).abs().max() < 0.01  # fifty steps of 0.002
    assert not torch.allclose(full.detach().double(), exact, atol=1e-6)
