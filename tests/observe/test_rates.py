"""Times, model FLOPs and the peak."""

import pytest
import torch

from megatron.observe.flops import FlopsShape, forward_flops_per_token, training_flops_per_token
from megatron.observe.memory import peak_memory_bytes
from megatron.observe.peak import find_peak, known_gpu_peak
from megatron.observe.timers import StepClock, Stopwatch


class FakeTime:
    def __init__(self):
        self.now, self.waits = 0.0, 0

    def __call__(self):
        return self.now

    def wait(self):
        self.waits += 1


def test_step_clock_means_over_the_lap_without_excluded_work_and_waits_only_there():
    time = FakeTime()
    clock = StepClock(time.wait, time)
    started = time.waits
    for _ in range(4):
        time.now += 0.5
        clock.count()
    assert time.waits == started  # counting does not wait for the device
    with clock.excluded():
        time.now += 100.0
    assert clock.lap() == pytest.approx(0.5)
    time.now += 0.25
    clock.count()
    assert clock.lap() == pytest.approx(0.25)
    assert clock.lap() != clock.lap()  # no iteration, no time


def test_stopwatch_adds_up():
    time = FakeTime()
    watch = Stopwatch(time)
    for seconds in (1.0, 2.0):
        with watch.part("save"):
            time.now += seconds
    assert watch.seconds == {"save": 3.0}


def test_flops_equal_the_published_formula():
    """72 b s l h^2 (1 + s/(6h) + v/(12 l h)), the count of arXiv:2104.04473 without its recomputation, a token."""
    layers, hidden, sequence, vocabulary = 24, 2048, 1024, 51200
    shape = FlopsShape(layers, hidden, 16, 16, hidden // 16, 4 * hidden, False, vocabulary, sequence)
    published = 72 * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocabulary / (12 * layers * hidden))
    assert training_flops_per_token(shape) == pytest.approx(published, rel=1e-12)


def test_flops_equal_what_torch_counts_in_a_gated_grouped_query_layer():
    hidden, heads, kv_heads, head_dim, width, vocabulary, sequence = 32, 4, 2, 8, 48, 96, 16
    shape = FlopsShape(1, hidden, heads, kv_heads, head_dim, width, True, vocabulary, sequence)
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(sequence, hidden)
    with FlopCounterMode(display=False) as counter:
        q = (x @ torch.randn(hidden, heads * head_dim)).view(sequence, heads, head_dim).transpose(0, 1)
        k = (x @ torch.randn(hidden, kv_heads * head_dim)).view(sequence, kv_heads, head_dim).transpose(0, 1)
        v = (x @ torch.randn(hidden, kv_heads * head_dim)).view(sequence, kv_heads, head_dim).transpose(0, 1)
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
        mixed = (torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)).transpose(0, 1).reshape(sequence, -1)
        x = mixed @ torch.randn(heads * head_dim, hidden)
        a, b = (x @ torch.randn(hidden, 2 * width)).chunk(2, -1)
        (a * b) @ torch.randn(width, hidden) @ torch.randn(hidden, vocabulary)
    assert forward_flops_per_token(shape) * sequence == counter.get_total_flops()


@pytest.mark.parametrize(
    ("driver_name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_gpus_have_their_dense_figure(driver_name, tflops):
    assert known_gpu_peak(driver_name).flops_per_second == pytest.approx(tflops * 1e12)


def test_an_unknown_gpu_is_not_taken_for_another():
    assert known_gpu_peak("NVIDIA A1000 Future") is None


def test_the_key_wins_and_the_peak_says_where_it_is_from():
    peak = find_peak("cpu", torch.float32, peak_theoretical_tflops=2.5)
    assert peak.flops_per_second == 2.5e12
    assert str(peak) == "2.5 TFLOP/s (peak_theoretical_tflops)"


def test_the_cpu_is_measured_to_at_least_what_a_large_product_reaches():
    import time

    peak = find_peak("cpu", torch.float32)
    left, right = torch.randn(768, 768), torch.randn(768, 768)
    torch.mm(left, right)
    best = float("inf")
    for _ in range(5):
        before = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - before)
    assert peak.flops_per_second > 0.5 * 2 * 768**3 / best  # loose: other processes share the cores
    assert "measured" in peak.name and "float32" in peak.name


def test_peak_memory_is_in_bytes():
    assert 20e6 < peak_memory_bytes("cpu") < 1e12
