"""Blocks without attention, against transformers, recurrences in float64 and the formulas of the papers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer as TheirMixer

from megatron.distributed.collectives import all_gather_last
from megatron.distributed.mesh import Topology
from megatron.kernels.scan import causal_convolution, linear_scan, selective_scan
from megatron.kernels.wkv import wkv
from megatron.model.mixers.gmlp import GMLPTransformerBlock
from megatron.model.mixers.mamba import MambaTransformerBlock
from megatron.model.mixers.rwkv import RWKVTransformerBlock
from megatron.param_table import tensors
from megatron.registry import MLP_ALONE, WITHOUT_ATTENTION
from tests.model.mixers import build, cache, dims, disturb
from tests.model.sections import VOCABULARY
from tests.multi_rank import run_distributed

KINDS = sorted(WITHOUT_ATTENTION - {MLP_ALONE})


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(length: int = 24) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))


def documents() -> Tensor:
    """The first row has documents from 0, 5 and 20 on, the second from 0, 16 and 17."""
    starts = torch.zeros(2, 24, dtype=torch.long)
    starts[0, 5:], starts[1, 16:] = 5, 16
    starts[0, 20:], starts[1, 17:] = 20, 17
    return starts


# Kernels


def test_a_scan_is_a_recurrence() -> None:
    keep, add = numbers(2, 37, 3).sigmoid(), numbers(2, 37, 3, seed=1)
    state, expected = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(37):
        state = keep[:, t] * state + add[:, t]
        expected.append(state)
    torch.testing.assert_close(linear_scan(keep, add), torch.stack(expected, 1))


def scan_inputs() -> tuple[Tensor, ...]:
    """x, step, A, B, C, D for 2 rows of 24 positions, 6 channels and 4 states."""
    step, rate = F.softplus(numbers(2, 24, 6)), -numbers(6, 4, seed=1).exp()
    return (
        numbers(2, 24, 6, seed=2),
        step,
        rate,
        numbers(2, 24, 4, seed=3),
        numbers(2, 24, 4, seed=4),
        numbers(6, seed=5),
    )


def scan_loop(state: Tensor, starts: Tensor | None) -> Tensor:
    x, step, rate, into, out, skip = scan_inputs()
    expected = []
    for t in range(24):
        if starts is not None:
            state = state * (starts[:, t] < t)[:, None, None]
        fed = (step[:, t] * x[:, t]).unsqueeze(-1) * into[:, t].unsqueeze(1)
        state = torch.exp(step[:, t].unsqueeze(-1) * rate) * state + fed
        expected.append((state * out[:, t].unsqueeze(1)).sum(-1) + skip * x[:, t])
    return torch.stack(expected, 1)


@pytest.mark.parametrize("apart", [False, True])
def test_a_selective_scan_is_a_recurrence(apart: bool) -> None:
    starts, state = documents() if apart else None, numbers(2, 6, 4, seed=6)
    resets = None if starts is None else starts == torch.arange(24)
    y, _ = selective_scan(*scan_inputs(), state, resets)
    torch.testing.assert_close(y, scan_loop(state, starts))


def test_a_selective_scan_continues_and_passes_over_padding() -> None:
    x, step, rate, into, out, skip = scan_inputs()
    complete, last = selective_scan(x, step, rate, into, out, skip)
    valid = torch.arange(24) < torch.tensor([[10], [24]])
    first, state = selective_scan(x, step, rate, into, out, skip, None, None, valid)
    torch.testing.assert_close(first[0, :10], complete[0, :10])
    torch.testing.assert_close(state[1], last[1])
    rest, _ = selective_scan(x[:1, 10:], step[:1, 10:], rate, into[:1, 10:], out[:1, 10:], skip, state[:1])
    torch.testing.assert_close(rest[0], complete[0, 10:])


def test_a_convolution_sees_what_is_there() -> None:
    x, weight, bias, before = numbers(2, 24, 3), numbers(3, 4, seed=1), numbers(3, seed=2), numbers(2, 3, 3, seed=3)
    padded = torch.cat((before, x), 1)
    expected = torch.stack([(padded[:, t : t + 4] * weight.T).sum(1) + bias for t in range(24)], 1)
    torch.testing.assert_close(causal_convolution(x, weight, bias, before), expected)
    torch.testing.assert_close(causal_convolution(x[:, :1], weight, bias, before), expected[:, :1])
    nothing = torch.zeros_like(before)
    apart = causal_convolution(x, weight, bias, nothing, documents())
    for row, first, end in ((0, 0, 5), (0, 5, 20), (0, 20, 24), (1, 16, 17), (1, 17, 24)):
        alone = causal_convolution(x[row : row + 1, first:end], weight, bias, nothing[:1])
        torch.testing.assert_close(apart[row, first:end], alone[0])


@pytest.mark.parametrize("apart", [False, True])
def test_wkv_is_a_recurrence(apart: bool) -> None:
    """Equation 17 of arXiv:2404.05892, position by position; decays from almost 1 to almost 0."""
    r, k, v = (numbers(2, 24, 3, 4, seed=seed) for seed in range(3))
    log_decay, bonus, state = (
        -(2 * numbers(2, 24, 3, 4, seed=4)).exp(),
        numbers(3, 4, seed=5),
        numbers(2, 3, 4, 4, seed=6),
    )
    starts = documents() if apart else None
    y, last = wkv(r, k, v, log_decay, bonus, state, starts)
    expected = []
    for t in range(24):
        if starts is not None:
            state = state * (starts[:, t] < t)[:, None, None, None]
        product = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        expected.append((r[:, t].unsqueeze(-1) * (state + bonus.unsqueeze(-1) * product)).sum(-2))
        state = log_decay[:, t].exp().unsqueeze(-1) * state + product
    torch.testing.assert_close(y, torch.stack(expected, 1))
    torch.testing.assert_close(last, state)


# Blocks against independent references


@pytest.mark.parametrize("bias", [False, True])
def test_mamba_is_that_of_transformers(bias: bool) -> None:
    """Their slow path, on the same weights: 1e-5. Theirs has no bias in x_proj."""
    block = build("mamba", mamba_use_bias_in_linears=bias).sequential[2]
    assert isinstance(block, MambaTransformerBlock)
    disturb(block)
    ours = block.mixer
    config = MambaConfig(hidden_size=64, num_hidden_layers=1, use_bias=bias, use_conv_bias=True)
    theirs = TheirMixer(config, 0).eval()
    values = dict(ours.state_dict())
    if bias:
        values.pop("x_proj.bias").zero_()
    theirs.load_state_dict(values)
    x = numbers(24, 2, 64).float()
    with torch.no_grad():
        expected = theirs(x.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(ours(x, None, None), expected, rtol=1e-5, atol=1e-5)


def shifted(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:1]), x[:-1]))


def rwkv_reference(block: RWKVTransformerBlock, x: Tensor) -> Tensor:
    """Block 0 for one text [s, h], in float64, from the formulas of arXiv:2404.05892, section 4.1 on."""
    p = dict(block.named_parameters())

    def norm(name: str, value: Tensor) -> Tensor:
        return F.layer_norm(value, (64,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    x = norm("ln1", x)
    h = norm("ln1", x)
    change = shifted(h) - h
    lora = torch.tanh((h + change * p["att.time_maa_x"][0, 0]) @ p["att.time_maa_w1"])
    mixed = {}
    for number, part in enumerate("wkvrg"):
        more = lora[:, 32 * number : 32 * (number + 1)] @ p["att.time_maa_w2"][number]
        mixed[part] = h + change * (p[f"att.time_maa_{part}"][0, 0] + more)
    decay = p["att.time_decay"][0, 0] + torch.tanh(mixed["w"] @ p["att.time_decay_w1"]) @ p["att.time_decay_w2"]
    w = torch.exp(-torch.exp(decay)).view(-1, 4, 16)
    r, k, v = (
        (mixed[part] @ p[f"att.{name}.weight"].T).view(-1, 4, 16)
        for part, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    state, rows = torch.zeros(4, 16, 16, dtype=torch.float64), []
    for t in range(len(x)):
        product = torch.einsum("nd,ne->nde", k[t], v[t])
        rows.append(torch.einsum("nd,nde->ne", r[t], state + p["att.time_faaaa"].unsqueeze(-1) * product))
        state = w[t].unsqueeze(-1) * state + product
    y = F.group_norm(torch.stack(rows).flatten(1), 4, p["att.ln_x.weight"], p["att.ln_x.bias"], 64e-5)
    x = x + (y * F.silu(mixed["g"] @ p["att.gate.weight"].T)) @ p["att.output.weight"].T
    h = norm("ln2", x)
    change = shifted(h) - h
    key = torch.relu((h + change * p["ffn.time_maa_k"][0, 0]) @ p["ffn.key.weight"].T) ** 2
    receptance = torch.sigmoid((h + change * p["ffn.time_maa_r"][0, 0]) @ p["ffn.receptance.weight"].T)
    return x + receptance * (key @ p["ffn.value.weight"].T)


def test_rwkv_is_the_recurrence_of_the_paper() -> None:
    block = build("rwkv", dtype=torch.float64).sequential[2]
    assert isinstance(block, RWKVTransformerBlock)
    disturb(block)
    x = numbers(24, 2, 64)
    with torch.no_grad():
        found = block(x)
        for row in range(2):
            torch.testing.assert_close(found[:, row], rwkv_reference(block, x[:, row]))


@pytest.mark.parametrize("kind", ["gmlp", "amlp"])
def test_gmlp_is_the_formula_of_the_paper(kind: str) -> None:
    """Figure 1 and section 4.3 of arXiv:2105.08050, for one text, position by position."""
    block = build(kind, dtype=torch.float64).sequential[2]
    assert isinstance(block, GMLPTransformerBlock)
    disturb(block)
    p, x = dict(block.named_parameters()), numbers(24, 64)
    h = F.layer_norm(x, (64,), p["norm.weight"], p["norm.bias"])
    plain, gate = F.gelu(h @ p["input_linear.weight"].T + p["input_linear.bias"]).chunk(2, -1)
    gate = F.layer_norm(gate, (128,), p["sgu.norm.weight"], p["sgu.norm.bias"])
    rows = []
    for t in range(24):
        row = p["sgu.proj.weight"][t, : t + 1] @ gate[: t + 1] + p["sgu.proj.bias"][t]
        if kind == "amlp":
            q, k, v = (h @ p["sgu.attn.proj_qkv.weight"].T + p["sgu.attn.proj_qkv.bias"]).chunk(3, -1)
            attended = (k[: t + 1] @ q[t] / 4).softmax(0) @ v[: t + 1]
            row = row + attended @ p["sgu.attn.proj_ffn.weight"].T + p["sgu.attn.proj_ffn.bias"]
        rows.append(row)
    expected = x + (plain * torch.stack(rows)) @ p["output_linear.weight"].T + p["output_linear.bias"]
    with torch.no_grad():
        found = block(x.unsqueeze(1))[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the softmax is in fp32


def test_initial_values_are_those_of_the_public_code() -> None:
    mixer = build("mamba").sequential[2].mixer
    torch.testing.assert_close(mixer.A_log[7].exp(), torch.arange(1.0, 17.0))
    steps = F.softplus(mixer.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.002 < 0.05 < steps.max() <= 0.1
    block = build("rwkv", blocks=3).sequential[3]  # block 1 of 3
    positions = torch.arange(64) / 64
    torch.testing.assert_close(block.att.time_maa_v[0, 0], 1 - positions ** (2 / 3) - 0.15, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block.att.time_maa_g[0, 0], 1 - positions ** (1 / 3), rtol=1e-5, atol=1e-6)
    assert block.att.time_decay[0, 0, 0] == -6
    assert block.att.time_decay[0, 0, -1].item() == pytest.approx(-1)
    gate = build("gmlp").sequential[2].sgu.proj
    assert gate.weight.count_nonzero() == 0
    assert bool((gate.bias == 1).all())


# What every kind must do


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_what_the_modules_hold(kind: str) -> None:
    table = {f"sequential.{shape.layer}.{shape.name}": shape.shape for shape in tensors(dims(kind), VOCABULARY)}
    assert table == {name: tuple(parameter.shape) for name, parameter in build(kind).named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: str) -> None:
    model = build(kind)
    disturb(model)
    model(tokens()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_no_position_sees_a_later_one(kind: str) -> None:
    model = build(kind)
    disturb(model)
    other = tokens()
    other[:, 15:] = (other[:, 15:] + 1) % VOCABULARY
    with torch.no_grad():
        torch.testing.assert_close(model(other)[:15], model(tokens())[:15], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_uncached(kind: str) -> None:
    """A prompt and single tokens; then two texts of different lengths, of which the shorter one was padded."""
    model = build(kind).eval()
    disturb(model)
    ids = tokens()
    with torch.no_grad():
        expected, memory = model(ids), cache(kind, 2)
        found = torch.cat([model(ids[:, :10], memory), *(model(ids[:, t : t + 1], memory) for t in range(10, 24))])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        memory.reset()
        memory.set_valid_lengths([6, 10])
        model(ids[:, :10], memory)
        memory.set_lengths([6, 10])
        for step in range(8):
            new = torch.stack((ids[0, 6 + step : 7 + step], ids[1, 10 + step : 11 + step]))
            scores = model(new, memory)[0]
            torch.testing.assert_close(scores[0], expected[6 + step, 0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(scores[1], expected[10 + step, 1], rtol=1e-5, atol=1e-5)
        memory.move(1, 0)
        torch.testing.assert_close(
            model(ids[1:, 18:19].expand(2, 1), memory)[0, 0], expected[18, 1], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_distances_start_again_with_attention(kind: str) -> None:
    """What is before a document changes nothing in it; the state of a document starts from nothing."""
    model = build(kind, reset=True)
    disturb(model)
    starts, ids, other = documents(), tokens(), tokens()
    other[0, :5], other[1, 16] = 7, 7
    with torch.no_grad():
        found = model(ids, None, starts)
        changed = model(other, None, starts)
        torch.testing.assert_close(changed[5:, 0], found[5:, 0])
        torch.testing.assert_close(changed[17:, 1], found[17:, 1])
        assert not torch.allclose(changed[4, 0], found[4, 0])
        together = model(ids)
        assert not torch.allclose(together[6, 0], found[6, 0])
        torch.testing.assert_close(together[:5, 0], found[:5, 0], rtol=1e-5, atol=1e-5)
        if kind in {"mamba", "mamba2", "rwkv", "gated_delta_net"}:
            torch.testing.assert_close(model(ids[:1, 5:20])[:, 0], found[5:20, 0], rtol=1e-5, atol=1e-5)


def local(full: dict[str, Tensor], kind: str, rank: int, size: int) -> dict[str, Tensor]:
    """The slices of whole tensors that a rank holds, by the table."""
    cut = {}
    for shape in tensors(dims(kind), VOCABULARY):
        value = full[f"sequential.{shape.layer}.{shape.name}"]
        if shape.shard_dim is not None:
            parts = [value.narrow(shape.shard_dim, start, stop - start) for start, stop in shape.slices(rank, size)]
            value = torch.cat(parts, dim=shape.shard_dim)
        cut[f"sequential.{shape.layer}.{shape.name}"] = value
    return cut


def cut_model(rank: int, size: int, values: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Logits, gradients and cached logits of every kind, without and with sequence parallelism."""
    topology = Topology.build(pipe=1, model=size, rank=rank, world_size=size)
    reported: dict[str, Any] = {}
    for kind, complete in values.items():
        for sequence in (False, True):
            axes = replace(topology, model=replace(topology.model, sequence_parallel=sequence))
            model = build(kind, axes, reset=True)
            model.load_state_dict(local(complete, kind, rank, size))
            logits = model(tokens(), None, documents())
            seen = all_gather_last(logits.detach(), topology.model)
            logits.square().sum().backward()
            reported[f"{kind} {sequence}"] = (seen, {name: value.grad for name, value in model.named_parameters()})
        memory = cache(kind, 2, model_size=size)
        with torch.no_grad():
            alone = build(kind, topology)
            alone.load_state_dict(local(complete, kind, rank, size))
            parts = [alone(tokens()[:, :20], memory), *(alone(tokens()[:, t : t + 1], memory) for t in range(20, 24))]
        reported[kind] = all_gather_last(torch.cat(parts), topology.model)
    return reported


def test_cut_blocks_equal_full_ones() -> None:
    """Tensor parallelism, with and without sequence parallelism, with documents apart; and generation with a cache."""
    values, expected = {}, {}
    for kind in KINDS:
        model = build(kind, reset=True)
        disturb(model)
        values[kind] = {name: value.detach().clone() for name, value in model.state_dict().items()}
        logits = model(tokens(), None, documents())
        seen = logits.detach().clone()
        logits.square().sum().backward()
        with torch.no_grad():
            expected[kind] = (seen, {name: value.grad for name, value in model.named_parameters()}, model(tokens()))
    for rank, reported in enumerate(run_distributed(cut_model, 2, values)):
        for kind, (logits, gradients, plain) in expected.items():
            torch.testing.assert_close(reported[kind], plain, rtol=1e-5, atol=1e-5)
            for sequence in (False, True):
                seen, found = reported[f"{kind} {sequence}"]
                torch.testing.assert_close(seen, logits, rtol=1e-5, atol=1e-5)
                for name, gradient in local(gradients, kind, rank, 2).items():
                    scale = gradient.abs().max().item()
                    torch.testing.assert_close(
                        found[name],
                        gradient,
                        rtol=1e-4,
                        atol=1e-5 * scale,
                        msg=lambda text, n=f"{kind} {name}": f"{n}: {text}",
                    )
