"""Selects the kernels of a model, once, when it is built."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.kernels.activations import Activation, activation_of
from megatron.kernels.attention import AttentionKernel
from megatron.kernels.cross_entropy import SoftmaxPass, softmax_pass
from megatron.kernels.dropout_add import DropoutAdd, dropout_add
from megatron.kernels.flash_linear_attention import choose_gated_delta
from megatron.kernels.gated_delta import DeltaRule, gated_delta
from megatron.kernels.grouped_matmul import GroupedKernel, choose_grouped, plain_grouped
from megatron.kernels.linear import LinearKernel, choose_linear, plain_linear
from megatron.kernels.mamba import MambaKernels, choose_mamba
from megatron.kernels.norms import LAYER_NORM, RMS_NORM, NormKernel
from megatron.kernels.permute import PERMUTATION, Permutation
from megatron.kernels.rotary import RotaryPair, rotary_pair
from megatron.kernels.weight_gradients import WeightGradients
from megatron.registry.attention import choose_backends
from megatron.registry.attention_facts import AttentionFacts, Capability
from megatron.registry.kernels import (
    OF_OPTIMIZERS,
    KernelFacts,
    choose_all,
    missing_kernels,
)
from megatron.registry.registry import load_target


@dataclass(frozen=True)
class Kernels:
    """The kernels of a model."""

    linear: LinearKernel
    """Matrix product of linear layers."""
    attention: Mapping[str, AttentionKernel] = field(default_factory=dict)
    """Kind of block -> its attention core."""
    rms_norm: NormKernel = RMS_NORM
    """Root mean square norm: scale [h], epsilon."""
    layer_norm: NormKernel = LAYER_NORM
    """Layer norm: weight [h] or None, bias [h] or None, epsilon."""
    activation: Callable[[str, Activation], Activation] = activation_of
    """(name, its formula) -> the activation."""
    rotary: RotaryPair = rotary_pair
    """Rotary positions."""
    dropout_add: DropoutAdd = dropout_add
    """Dropout of a term of the residual stream, and the sum."""
    cross_entropy: SoftmaxPass = softmax_pass
    """Softmax over the vocabulary."""
    permutation: Permutation = PERMUTATION
    """Tokens to the experts and back."""
    grouped: GroupedKernel = plain_grouped
    """Matrix products of experts."""
    mamba: MambaKernels = field(
        default_factory=lambda: choose_mamba(torch.device("cpu"), convolution=False, scan=False)
    )
    """Convolution and scan of Mamba blocks."""
    gated_delta: DeltaRule = gated_delta
    """Gated delta rule."""
    recompute: Callable[..., Tensor] | None = None
    """recompute(core, *inputs) repeats an attention core in the backward pass; None if it is saved."""

    def recomputed(self, recompute: Callable[..., Tensor]) -> Kernels:
        """Returns kernels whose attention core is recomputed in the backward pass: recompute(core, *inputs)."""
        cores = {kind: partial(recompute, core) for kind, core in self.attention.items()}
        return replace(self, attention=cores, recompute=recompute)


def load_choices(facts: KernelFacts, section: Any) -> dict[str, Any]:
    """Returns operation -> implementation for a model's rows of the table of kernels (megatron/registry/kernels.py).

    Raises ConfigError where `kernels: triton`, or on a GPU a key, asks for a kernel that cannot be used.
    """
    choices = {name: choice for name, choice in choose_all(facts, section).items() if name not in OF_OPTIMIZERS}
    ConfigError.raise_any(missing_kernels(choices.values(), facts))
    return {name: load_target(choice.entry.target) for name, choice in choices.items()}


def load_optimizer_kernel(operation: str | None, facts: KernelFacts, section: Any) -> Any:
    """Returns the implementation of an optimizer's operation; None for an optimizer that has none.

    Raises ConfigError where `kernels: triton`, or on a GPU a key, asks for a kernel that cannot be used.

    Args:
        operation: One of OF_OPTIMIZERS, or None.
        facts: What decides which kernels can be used.
        section: The configuration's kernels section, or None.
    """
    if operation is None:
        return None
    choice = choose_all(facts, section)[operation]
    ConfigError.raise_any(missing_kernels([choice], facts))
    return load_target(choice.entry.target)


def load_attention(facts: AttentionFacts, kinds: Collection[str], section: Any) -> Mapping[str, AttentionKernel]:
    """Returns kind of block -> backend, for the table of backends (megatron/registry/attention.py).

    Raises ConfigError where, on a GPU, a key asks for a backend that cannot serve.

    Args:
        facts: Facts of the model.
        kinds: Kinds of blocks of the model that have attention.
        section: The configuration's kernels section, or None.
    """
    choices = choose_backends(facts, kinds, section)
    ConfigError.raise_any(missing_kernels(choices.values(), facts.kernels))
    return {kind: load_target(choice.entry.target) for kind, choice in choices.items()}


def choose_kernels(
    device: torch.device,
    dtype: torch.dtype,
    section: Any = None,
    activation: str = "",
    later: WeightGradients | None = None,
) -> Kernels:
    """Returns the fastest available kernels for parameters of this type on this device, attention's aside.

    Raises ConfigError.

    Args:
        device: Device of the model.
        dtype: Type of the parameters.
        section: The configuration's kernels section, which chooses some of them.
        activation: The key `activation`.
        later: Takes the gradients of weights that a backward pass leaves for later; None if it leaves none.
    """
    fused = getattr(section, "mamba_inner_func_fusion", False)
    compiled = getattr(section, "compile", False)  # torch.compile fuses torch's own kernels only
    return Kernels(
        linear=plain_linear if compiled else choose_linear(device, dtype, later),
        grouped=choose_grouped(device, dtype),
        mamba=choose_mamba(
            device,
            convolution=fused or getattr(section, "mamba_causal_conv_fusion", False),
            scan=fused or getattr(section, "mamba_selective_scan_fusion", False),
        ),
        gated_delta=choose_gated_delta(device, fused=getattr(section, "gated_delta_fusion", False)),
        **load_choices(facts_of(device, dtype, section, activation), section),
    )


def facts_of(device: torch.device, dtype: torch.dtype, section: Any, activation: str) -> KernelFacts:
    """Returns what decides which kernels can be used.

    Args:
        device: Device of the model.
        dtype: Type of the parameters.
        section: The configuration's kernels section, or None.
        activation: The key `activation`.
    """
    return KernelFacts.of(device.type, str(dtype).removeprefix("torch."), section, activation)


def capability_of(device: torch.device) -> Capability | None:
    """Returns the CUDA capability of a device; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
