"""Every registered optimizer: 50 steps against an independent implementation, which parameters decay, what it keeps.

The references are other packages' optimizers where there are any, else the paper's formula in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Topology
from megatron.distributed.param_attrs import mark_embedding_like, mark_no_weight_decay
from megatron.kernels import cpu_newton_schulz
from megatron.optim.builder_args import AveragingOptimizer, OptimizerArgs
from megatron.optim.param_groups import parameter_groups
from megatron.optim.state_io import read_state, write_state
from megatron.registry import EIGHT_BIT, OPTIMIZERS

STEPS, LR, DECAY = 50, 1.0e-2, 0.1
MATRIX, TABLE, VECTOR = (6, 10), (12, 6), (10,)


def parameters(dtype: torch.dtype = torch.float32, scale: int = 1) -> list[Parameter]:
    """A matrix, a table of tokens and a vector without decay; the same values every time."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for shape in (MATRIX, TABLE, VECTOR):
        grown = (shape[0] * scale, *shape[1:])
        made.append(Parameter(torch.randn(grown, generator=generator).to(dtype)))
    mark_embedding_like(made[1])
    mark_no_weight_decay(made[2])
    return made


def gradients(step: int, params: list[Parameter]) -> list[Tensor]:
    """Gradients of a noisy bowl: they depend on the weights, so a wrong step shows in all later ones."""
    generator = torch.Generator().manual_seed(100 + step)
    return [0.3 * p.detach() + torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def ours(name: str, settings: dict[str, Any], steps: int = STEPS, **more: Any) -> list[Tensor]:
    """The weights after some steps of the registered optimizer, its rate falling as a schedule's does."""
    params = parameters(**more)
    optimizer = OPTIMIZERS.load(name)(parameter_groups(params, DECAY), OptimizerArgs(LR, Topology.single(), settings))
    return run(optimizer, params, steps)


def run(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int = STEPS) -> list[Tensor]:
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for parameter, gradient in zip(params, gradients(step, params), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach().clone() for parameter in params]


def rate(step: int) -> float:
    return LR * (1 - step / (2 * STEPS))


Update = Callable[[int, int, Tensor, Tensor, dict[str, Tensor]], Tensor]


def formula(update: Update) -> list[Tensor]:
    """The weights by a formula in float64. update(step from 1, index, weight, gradient, state) -> the new weight."""
    params = parameters(torch.float64)
    states: list[dict[str, Tensor]] = [{} for _ in params]
    for step in range(STEPS):
        grads = gradients(step, params)
        for index, parameter in enumerate(params):
            parameter.data = update(step + 1, index, parameter.data, grads[index], states[index])
    return [parameter.detach() for parameter in params]


def decay(index: int) -> float:
    return 0.0 if index == 2 else DECAY


def adam(correct: bool = True, decoupled: bool = True, amsgrad: bool = False) -> Update:
    def update(step: int, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
        lr = rate(step - 1)
        gradient = gradient if decoupled else gradient + decay(index) * weight
        first = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * gradient
        second = state["v"] = 0.95 * state.get("v", 0.0) + 0.05 * gradient**2
        if amsgrad:
            second = state["max"] = torch.maximum(state.get("max", torch.zeros_like(second)), second)
        c1, c2 = (1 - 0.9**step, 1 - 0.95**step) if correct else (1.0, 1.0)
        weight = weight * (1 - lr * decay(index)) if decoupled else weight
        return weight - lr * (first / c1) / ((second / c2).sqrt() + 1e-6)

    return update


def lion(step: int, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    momentum = state.get("m", torch.zeros_like(weight))
    state["m"] = 0.99 * momentum + 0.01 * gradient
    return weight - rate(step - 1) * ((0.9 * momentum + 0.1 * gradient).sign() + decay(index) * weight)


def sgd(step: int, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    gradient = gradient + decay(index) * weight
    state["m"] = 0.9 * state.get("m", 0.0) + gradient
    return weight - rate(step - 1) * (gradient + 0.9 * state["m"])


def madgrad(step: int, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Algorithm 1, with the weights of the last step decayed; the package adds eps to the rate."""
    first = state.setdefault("x0", weight.clone())
    lr = rate(step - 1) + 1e-6
    factor = lr * math.sqrt(step)
    state["s"] = state.get("s", 0.0) + factor * gradient
    state["v"] = state.get("v", 0.0) + factor * gradient**2
    target = first - state["s"] / (state["v"].pow(1 / 3) + 1e-6)
    return 0.9 * weight + 0.1 * target - lr * decay(index) * weight


def sm3(step: int, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Algorithm SM3-II; the momentum is a mean of updates."""
    weight = weight * (1 - rate(step - 1) * decay(index))
    if gradient.dim() == 1:
        second = state["v"] = state.get("v", 0.0) + gradient**2
    else:
        rows = state.get("rows", gradient.new_zeros(gradient.shape[0], 1))
        columns = state.get("columns", gradient.new_zeros(1, gradient.shape[1]))
        second = torch.minimum(rows, columns) + gradient**2
        state["rows"], state["columns"] = second.amax(1, keepdim=True), second.amax(0, keepdim=True)
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * gradient / (second + 1e-30).sqrt()
    return weight - rate(step - 1) * state["m"]


def adafactor(step: int, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Algorithms 4 and 5 with relative steps (section 8) and the second moment's rate 1 - t^-0.8 (section 7.2)."""
    keep = 1 - step**-0.8
    square = gradient**2
    if gradient.dim() == 1:
        second = state["v"] = keep * state.get("v", 0.0) + (1 - keep) * square
    else:
        rows = state["rows"] = keep * state.get("rows", 0.0) + (1 - keep) * square.mean(1, keepdim=True)
        columns = state["columns"] = keep * state.get("columns", 0.0) + (1 - keep) * square.mean(0, keepdim=True)
        second = rows * columns / rows.mean()
    step_size = gradient / second.sqrt()
    step_size = step_size / max(1.0, float(step_size.square().mean().sqrt()))
    size = max(1e-3, float(weight.square().mean().sqrt())) * min(rate(step - 1), 1 / math.sqrt(step))
    return weight * (1 - rate(step - 1) * decay(index)) - size * step_size


def ademamix(step: int, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Equation 2, with the warmups of section 3.1 over the first 20 updates."""
    lr, alpha, beta3 = rate(step - 1), min(step * 5 / 20, 5), 0.999
    if step < 20:
        part = step / 20
        low, high = math.log(0.9), math.log(0.999)
        beta3 = min(0.999, math.exp(low * high / ((1 - part) * high + part * low)))
    first = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * gradient
    slow = state["slow"] = beta3 * state.get("slow", 0.0) + (1 - beta3) * gradient
    second = state["v"] = 0.95 * state.get("v", 0.0) + 0.05 * gradient**2
    step_size = (first / (1 - 0.9**step) + alpha * slow) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
    return weight - lr * (step_size + decay(index) * weight)


def schedule_free(step: int, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Algorithm 1 with the rates of section 4, x and z apart; the weight is y. The largest rate is the first one."""
    iterate, mean = state.get("z", weight), state.get("x", weight)
    second = state["v"] = 0.95 * state.get("v", 0.0) + 0.05 * gradient**2
    direction = gradient / ((second / (1 - 0.95**step)).sqrt() + 1e-6) + decay(index) * weight
    state["sum"] = state.get("sum", torch.zeros(())) + rate(0) ** 2
    share = rate(0) ** 2 / state["sum"]
    iterate = state["z"] = iterate - rate(step - 1) * direction
    mean = state["x"] = (1 - share) * mean + share * iterate
    return 0.9 * mean + 0.1 * iterate


ADAM = {"betas": [0.9, 0.95], "eps": 1.0e-6}
CASES: list[tuple[str, dict[str, Any], Update]] = [
    ("adam", ADAM, adam()),
    ("adam", {**ADAM, "bias_correction": False}, adam(correct=False)),
    ("adam", {**ADAM, "adam_w_mode": False}, adam(decoupled=False)),
    ("adam", {**ADAM, "amsgrad": True}, adam(amsgrad=True)),
    ("adam", {**ADAM, "bias_correction": False, "adam_w_mode": False}, adam(correct=False, decoupled=False)),
    ("adam", {**ADAM, "bias_correction": False, "amsgrad": True}, adam(correct=False, amsgrad=True)),
    ("cpu_torch_adam", ADAM, adam()),
    ("cpu_torch_adam", {**ADAM, "bias_correction": False}, adam(correct=False)),
    ("cpu_adam", ADAM, adam()),
    ("cpu_adam", {**ADAM, "bias_correction": False}, adam(correct=False)),
    ("cpu_adam", {**ADAM, "adam_w_mode": False}, adam(decoupled=False)),
    ("onebitadam", {**ADAM, "freeze_step": STEPS}, adam()),
    ("lion", {}, lion),
    ("sgd", {"momentum": 0.9, "nesterov": True}, sgd),
    ("madgrad_wd", {}, madgrad),
    ("sm3", {"momentum": 0.9}, sm3),
    ("adafactor", {}, adafactor),
    ("schedulefree", ADAM, schedule_free),
    ("ademamix", {**ADAM, "beta3": 0.999, "slow_warmup": 20}, ademamix),
]


@pytest.mark.parametrize(
    ("name", "settings", "update"), CASES, ids=[f"{name} {settings}"[:60] for name, settings, _ in CASES]
)
def test_fifty_steps_follow_the_formula(name: str, settings: dict[str, Any], update: Update) -> None:
    """fp32 against float64 over 50 steps: 1e-4 of weights around 1; a step of theirs is 1e-2."""
    for got, expected in zip(ours(name, settings), formula(update), strict=True):
        assert got == pytest.approx(expected.float(), abs=1e-4)


def test_muon_is_torch_s_for_matrices_and_adamw_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_newton_schulz, "needs_fp32_matmul", lambda *_: False)  # as where a CPU has bfloat16
    matrix, table, vector = ours("muon", ADAM)
    params = parameters()
    muon = torch.optim.Muon(params[:1], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    other = torch.optim.AdamW(parameter_groups(params[1:], DECAY), lr=LR, betas=(0.9, 0.95), eps=1e-6)
    for step in range(STEPS):
        for group in [*muon.param_groups, *other.param_groups]:
            group["lr"] = rate(step)
        for parameter, gradient in zip(params, gradients(step, params), strict=True):
            parameter.grad = gradient
        muon.step()
        other.step()
    assert torch.equal(matrix, params[0])
    for got, expected in ((table, params[1]), (vector, params[2])):
        assert got == pytest.approx(expected.detach(), abs=1e-6)


def test_muon_s_step_has_singular_values_near_one() -> None:
    """Without decay and momentum a step is rate x 0.2 x sqrt(10) times a matrix whose singular values are about 1."""
    (parameter, *_) = parameters()
    before = parameter.detach().clone()
    settings = {"momentum": 0.0, "nesterov": False}
    build = OPTIMIZERS.load("muon")
    optimizer = build(parameter_groups([parameter], 0.0), OptimizerArgs(LR, Topology.single(), settings))
    parameter.grad = gradients(0, [parameter])[0]
    optimizer.step()
    values = torch.linalg.svdvals((before - parameter.detach()) / (LR * 0.2 * math.sqrt(10)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_soap_is_the_package_s() -> None:
    """Fifty steps with a new eigenbasis every three; the package counts updates by group."""
    from pytorch_optimizer import SOAP

    params = parameters()
    optimizer = SOAP(parameter_groups(params, DECAY), lr=LR, betas=(0.9, 0.95), eps=1e-6, precondition_frequency=3)
    expected = run(optimizer, params)
    for got, same in zip(ours("soap", {**ADAM, "precondition_frequency": 3}), expected, strict=True):
        assert torch.equal(got, same)


def test_shampoo_is_the_package_s() -> None:
    """Fifty steps in blocks of four rows and columns, with new inverse roots every three."""
    from pytorch_optimizer import ScalableShampoo

    params = parameters()
    optimizer = ScalableShampoo(
        parameter_groups(params, DECAY),
        lr=LR,
        betas=(0.9, 0.95),
        moving_average_for_momentum=True,
        decoupled_weight_decay=True,
        start_preconditioning_step=5,
        preconditioning_compute_steps=3,
        block_size=4,
        shape_interpretation=False,
        graft_type=3,  # RMSProp
    )
    expected = run(optimizer, params)
    got = ours("shampoo", {"betas": [0.9, 0.95], **SETTINGS["shampoo"]})
    for one, same in zip(got, expected, strict=True):
        assert torch.equal(one, same)
    unconditioned = ours("shampoo", {"betas": [0.9, 0.95], **SETTINGS["shampoo"], "max_dim": 5})
    assert not torch.equal(got[0], unconditioned[0])


def test_every_optimizer_is_compared_with_something() -> None:
    assert {name for name, _, _ in CASES} | {"muon", "soap", "shampoo"} == set(OPTIMIZERS.names)


SETTINGS: dict[str, dict[str, Any]] = {
    "onebitadam": {"freeze_step": 3},
    "sgd": {"momentum": 0.9},
    "soap": {"precondition_frequency": 2, "max_dim": 1000},
    "shampoo": {"precondition_frequency": 3, "start_step": 5, "block_size": 4},
}


def build(name: str, params: list[Parameter], eight_bit: bool = False) -> torch.optim.Optimizer:
    family = EIGHT_BIT if eight_bit else OPTIMIZERS
    groups = parameter_groups(params, DECAY)
    return family.load(name)(groups, OptimizerArgs(LR, Topology.single(), SETTINGS.get(name, {})))


MEMBERS = [*((name, False) for name in OPTIMIZERS.names), *((name, True) for name in EIGHT_BIT.names)]


@pytest.mark.parametrize(("name", "eight_bit"), MEMBERS)
def test_what_is_retained_is_all_that_there_is(name: str, eight_bit: bool) -> None:
    """An optimizer that was given what another one kept goes on with the same bits; tensors of 7,200 elements have
    eight-bit state.
    """
    first, second = parameters(scale=120), parameters(scale=120)
    optimizer = build(name, first, eight_bit)
    run(optimizer, first, 6)
    again = build(name, second, eight_bit)
    for old, new in zip(first, second, strict=True):
        new.data.copy_(old.data)
        found = read_state(optimizer, old)
        assert found.elementwise or found.tensor_level
        parts = (found.elementwise, found.tensor_level)
        copies = [{key: value.clone() for key, value in part.items()} for part in parts]
        write_state(again, new, type(found)(found.step, *copies))
    if isinstance(optimizer, AveragingOptimizer):
        assert isinstance(again, AveragingOptimizer)
        again.load_numbers(optimizer.numbers())
    for step in range(6, 12):
        for one, params in ((optimizer, first), (again, second)):
            for group in one.param_groups:
                group["lr"] = rate(step)
            for parameter, gradient in zip(params, gradients(step, params), strict=True):
                parameter.grad = gradient
            one.step()
    rounding = 1e-6 if name == "shampoo" else 0.0  # batched products of small blocks depend on where memory begins
    for old, new in zip(first, second, strict=True):
        torch.testing.assert_close(new, old, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("name", "eight_bit"), MEMBERS)
def test_marked_parameters_do_not_decay(name: str, eight_bit: bool) -> None:
    """Without a gradient a step is decay alone; the vector's mark exempts it."""
    params = [Parameter(torch.ones(p.shape)) for p in parameters()]
    mark_no_weight_decay(params[2])
    optimizer = build(name, params, eight_bit)
    for _ in range(2):  # the first step of SOAP only measures
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(params[2].detach(), torch.ones(VECTOR))
    assert (params[0] < 1).all()


@pytest.mark.parametrize("name", EIGHT_BIT.names)
def test_eight_bits_stay_near_thirty_two(name: str) -> None:
    """50 steps over tensors of 7,200 elements: the mean difference is below a tenth of the way that was gone."""
    params, start = parameters(scale=120), parameters(scale=120)
    low = run(build(name, params, eight_bit=True), params)
    params = parameters(scale=120)
    settings = {"momentum": 0.9} if name == "sgd" else {}
    exact = run(
        OPTIMIZERS.load(name)(parameter_groups(params, DECAY), OptimizerArgs(LR, Topology.single(), settings)), params
    )
    for got, expected, begin in zip(low, exact, start, strict=True):
        assert (got - expected).abs().mean() < 0.1 * (expected - begin).abs().mean()
    assert not torch.equal(low[0], exact[0])


def test_codes_are_numbers_and_back() -> None:
    from megatron.optim.bitsandbytes import codes, numbers  # imports bitsandbytes

    table = torch.linspace(-0.9, 1.0, 256)
    stored = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    stored[:2], stored[256:258] = torch.tensor([255, 0]), torch.tensor([0, 1])
    stored[300], stored[600], stored[800] = 255, 255, 0
    scales = torch.tensor([0.5, 3e-7, 2e4, 1.0])
    again, scales_again = codes(numbers(stored, scales, table), table)
    assert torch.equal(again, stored)
    assert scales_again == pytest.approx(scales, rel=1e-6)
