"""Times and the peak."""

import pytest
import torch

from megatron.metrics.memory import peak_memory_bytes
from megatron.metrics.peak_flops import find_peak, known_gpu_peak
from megatron.metrics.timers import StepClock


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
