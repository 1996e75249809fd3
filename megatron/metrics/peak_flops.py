"""Peak FLOP/s of a device, the denominator of model FLOPs utilization.

The source of the peak is reported with the utilization. For known GPUs it is the maker's dense bf16 figure (fp16 where
the GPU has no bf16), never the doubled one for sparse weights. Other GPUs and CPUs are measured with matrix products of
the run's data type. The key `peak_theoretical_tflops` overrides both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron.kernels.cpu_features import needs_fp32_matmul
from megatron.kernels.linear import choose_linear

# (part of the device's name, dense TFLOP/s); the first match wins, so that longer names are before shorter ones.
# Sources: the makers' data sheets; for GeForce cards the architecture whitepapers, with fp32 accumulation.
DENSE_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("H800 PCIe", 756.0),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.05),
    ("L40", 181.05),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),  # a device is one of its two dies
    ("MI210", 181.0),
)

_MEASURE_SECONDS = 0.2
_MEASURE_SIZE = 1024


@dataclass(frozen=True)
class Peak:
    """Peak of one device."""

    flops_per_second: float
    """The peak [FLOP/s]."""
    name: str
    """Its source."""

    def __str__(self) -> str:
        return f"{self.flops_per_second / 1e12:.4g} TFLOP/s ({self.name})"


def find_peak(device: torch.device | str, dtype: torch.dtype, peak_theoretical_tflops: float | None = None) -> Peak:
    """Returns the peak of a device: the key's value, else the table's, else a measurement (under 0.3 s on a CPU)."""
    if peak_theoretical_tflops is not None:
        return Peak(peak_theoretical_tflops * 1e12, "peak_theoretical_tflops")
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = known_gpu_peak(name)
        return known if known is not None else measure_peak(device, dtype, f"measured, {name} is not listed")
    return measure_peak(device, dtype, f"measured on this CPU, {torch.get_num_threads()} threads")


def known_gpu_peak(device_name: str) -> Peak | None:
    """Returns the listed peak of a GPU by its driver's name; None when it is not listed."""
    words = device_name.replace("-", " ").upper().split()
    for part, tflops in DENSE_TFLOPS:
        part_words = part.upper().split()
        if any(words[at : at + len(part_words)] == part_words for at in range(len(words))):
            precision = "fp16" if part in ("V100", "T4") else "bf16"
            return Peak(tflops * 1e12, f"{part} dense {precision}")
    return None


def measure_peak(device: torch.device, dtype: torch.dtype, name: str) -> Peak:
    """Measures the best FLOP/s of a square matrix product in `dtype`: torch's own, or that of the layers."""
    size = _MEASURE_SIZE if device.type == "cpu" else 8 * _MEASURE_SIZE
    left = torch.ones(size, size, device=device, dtype=dtype)
    right = torch.ones(size, size, device=device, dtype=dtype)
    layer = choose_linear(device, dtype)
    products = [lambda: layer(left, right, None)]
    if not needs_fp32_matmul(device, dtype):
        products.append(lambda: torch.mm(left, right))
    best = min(_best_seconds(product, device, _MEASURE_SECONDS / len(products)) for product in products)
    kind = str(dtype).removeprefix("torch.")
    return Peak(2 * size**3 / best, f"{name}, {kind} matrix product")


def _best_seconds(product: Callable[[], torch.Tensor], device: torch.device, budget: float) -> float:
    """Returns the shortest time of one product within about `budget` seconds."""
    best = float("inf")
    begin = time.perf_counter()
    with torch.inference_mode():
        while True:
            before = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            best = min(best, now - before)
            if now - begin >= budget:
                return best
