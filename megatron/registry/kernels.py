"""The table of kernels: operation -> candidates in order, each with the reasons why it cannot be used.

The table needs no torch, so that the plan of a run can print it before any worker starts. When a model is built,
`megatron/kernels/dispatch.py` loads the chosen targets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from megatron.errors import ConfigIssue
from megatron.registry.entry import Entry

TORCH, TRITON = "torch", "triton"
NEWTON_SCHULZ, FUSED_ADAM = "newton_schulz", "adam"
OF_OPTIMIZERS = frozenset({NEWTON_SCHULZ, FUSED_ADAM})
"""Operations of optimizers; all others are a model's."""
TRITON_ACTIVATIONS = frozenset(
    {
        *("gelu", "gelu_tanh", "relu", "squared_relu", "silu", "swish", "softsign", "mish"),
        *("swiglu", "geglu", "geglu_tanh", "reglu", "glu", "bilinear"),
    }
)
FLASH_ACTIVATIONS = frozenset({"swiglu"})
FP32, FP16, BF16 = "float32", "float16", "bfloat16"


def is_installed(package: str) -> bool:
    """Returns whether a package can be imported, or a distribution (`flash-attn-4`) is there, without importing it.

    A folder that only holds another distribution's part of a package is none: its spec has no file.
    """
    if "-" in package:
        return any(distributions(name=package))
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def interpreted() -> bool:
    """Returns whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def mode_of(section: Any) -> str:
    """Returns the key `kernels` of the configuration's kernels section; its default without one."""
    mode: str = getattr(section, "kernels", "auto")
    return mode


@dataclass(frozen=True)
class KernelFacts:
    """What decides which kernels can be used."""

    device: str
    """`cuda` or `cpu`."""
    dtype: str
    """Type of the parameters, as torch spells it without its prefix."""
    compiled: bool = False
    """True if torch.compile fuses the operations of a block."""
    interpreted: bool = False
    """True if Triton's interpreter runs the kernels (TRITON_INTERPRET=1), which works on a CPU."""
    activation: str = ""
    """The key `activation`."""
    installed: Callable[[str], bool] = is_installed
    """Whether a package is installed."""

    @staticmethod
    def of(device: str, dtype: str, section: Any, activation: str) -> KernelFacts:
        """Returns the facts of a model.

        Args:
            device: `cuda` or `cpu`.
            dtype: Type of the parameters.
            section: The configuration's kernels section, or None.
            activation: The key `activation`.
        """
        asks = mode_of(section) == TRITON
        compiled = getattr(section, "compile", False)
        return KernelFacts(device, dtype, compiled, interpreted=asks and interpreted(), activation=activation)


Reason = Callable[[KernelFacts], str | None]


@dataclass(frozen=True, kw_only=True)
class KernelEntry(Entry):
    """A candidate for an operation. name: what the key `kernels` calls it."""

    unavailable: Reason
    """Returns the reason why it cannot be used, or None."""
    key: str | None = None
    """The configuration key that asks for it by name."""


@dataclass(frozen=True)
class KernelChoice:
    """The candidate that serves an operation, and why those before it do not."""

    operation: str
    """Name of the operation."""
    entry: Entry
    """The candidate that is used."""
    rejected: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Candidates before it, with the reason of each."""
    missing: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Candidates that were asked for by name and cannot be used: key or `kernels` -> reason."""


def no_reason(facts: KernelFacts) -> None:
    """The plain implementation can always be used."""
    return


def triton_unavailable(facts: KernelFacts) -> str | None:
    """Returns the reason why the Triton kernels cannot be used, or None."""
    if facts.device != "cuda" and not facts.interpreted:
        return f"Triton's kernels are for GPUs, and the model is on {facts.device}"
    if not facts.installed("triton"):
        return "the package triton is not installed (pip install neox[triton])"
    if facts.dtype not in (FP32, FP16, BF16):
        return f"Triton's kernels compute in fp32, and the model is in {facts.dtype}"
    return None


def triton_in_blocks(facts: KernelFacts) -> str | None:
    """The same for operations inside blocks, which torch.compile fuses by itself."""
    if facts.compiled:
        return "torch.compile fuses torch's own operators"
    return triton_unavailable(facts)


def apex_unavailable(facts: KernelFacts) -> str | None:
    """Returns the reason why NVIDIA Apex cannot be used, or None; another project has its name on PyPI."""
    if facts.device != "cuda":
        return f"Apex is for GPUs, and the model is on {facts.device}"
    if facts.compiled:
        return "torch.compile fuses torch's own operators"
    if not facts.installed("fused_layer_norm_cuda"):
        return "NVIDIA Apex is not installed with its fused norms (github.com/NVIDIA/apex says how)"
    return None


def apex_adam_unavailable(facts: KernelFacts) -> str | None:
    """Returns the reason why the Adam of NVIDIA Apex cannot be used, or None."""
    if facts.device != "cuda":
        return f"Apex is for GPUs, and the model is on {facts.device}"
    if not (facts.installed("apex") and facts.installed("amp_C")):
        return "NVIDIA Apex is not installed with its CUDA extensions (github.com/NVIDIA/apex says how)"
    return None


def triton_activation_unavailable(facts: KernelFacts) -> str | None:
    """The same for activations, of which Triton has those of the public configuration."""
    if facts.activation not in TRITON_ACTIVATIONS:
        return f"there is no kernel of the activation {facts.activation}"
    return triton_in_blocks(facts)


def flash_swiglu_unavailable(facts: KernelFacts) -> str | None:
    """Returns the reason why flash-attn's swiglu cannot be used, or None."""
    if facts.activation not in FLASH_ACTIVATIONS:
        return f"it computes swiglu, and the activation is {facts.activation}"
    if facts.device != "cuda":
        return f"it is for GPUs, and the model is on {facts.device}"
    if facts.compiled:
        return "torch.compile fuses torch's own operators"
    if not facts.installed("flash_attn"):
        return "the package flash-attn is not installed (pip install neox[flash])"
    return None


def _candidates(
    name: str, plain: str, doc: str, key: str | None = None, reason: Reason = triton_in_blocks
) -> tuple[KernelEntry, KernelEntry]:
    return (
        KernelEntry(TRITON, f"megatron.kernels.triton.{name}", doc, extra="triton", unavailable=reason, key=key),
        KernelEntry(TORCH, plain, "Operators of torch", unavailable=no_reason),
    )


def _norm_candidates(name: str, key: str) -> tuple[KernelEntry, ...]:
    triton, plain = _candidates(f"norms:{name}", f"megatron.kernels.norms:{name}", "One pass", key)
    apex = KernelEntry(
        "apex",
        f"megatron.kernels.apex:{name}",
        "Apex's fused norm",
        extra="apex",
        unavailable=apex_unavailable,
        key=key,
    )
    return triton, apex, plain


OPERATIONS: Mapping[str, tuple[KernelEntry, ...]] = MappingProxyType(
    {
        "rms_norm": _norm_candidates("RMS_NORM", "rmsnorm_fusion"),
        "layer_norm": _norm_candidates("LAYER_NORM", "layernorm_fusion"),
        "activation": (
            KernelEntry(
                TRITON,
                "megatron.kernels.triton.activations:activation_of",
                "One launch forward and one backward",
                extra="triton",
                unavailable=triton_activation_unavailable,
                key="bias_gelu_fusion",
            ),
            KernelEntry(
                "flash-attn",
                "megatron.kernels.flash_attention:flash_swiglu_of",
                "swiglu in one launch",
                extra="flash",
                unavailable=flash_swiglu_unavailable,
                key="use_flashattn_swiglu",
            ),
            KernelEntry(
                TORCH, "megatron.kernels.activations:activation_of", "Operators of torch", unavailable=no_reason
            ),
        ),
        "rotary": _candidates(
            "rotary:rotary_pair", "megatron.kernels.rotary:rotary_pair", "Queries and keys in one launch", "rope_fusion"
        ),
        "dropout_add": _candidates(
            "dropout_add:dropout_add",
            "megatron.kernels.dropout_add:dropout_add",
            "Dropout and residual sum in one launch",
            "bias_dropout_fusion",
        ),
        "cross_entropy": _candidates(
            "cross_entropy:softmax_pass",
            "megatron.kernels.cross_entropy:softmax_pass",
            "Softmax over the vocabulary in one pass",
            reason=triton_unavailable,
        ),
        "permutation": _candidates(
            "permute:PERMUTATION", "megatron.kernels.permute:PERMUTATION", "Tokens to experts without a scatter"
        ),
        NEWTON_SCHULZ: _candidates(
            "newton_schulz:NEWTON_SCHULZ",
            "megatron.kernels.newton_schulz:NEWTON_SCHULZ",
            "Half of each symmetric product of Muon's iterations",
            reason=triton_unavailable,
        ),
        FUSED_ADAM: (
            KernelEntry(TORCH, "megatron.optim.adam:build_fused", "torch's fused Adam", unavailable=no_reason),
            KernelEntry(
                "apex",
                "megatron.optim.apex_adam:build",
                "Apex's fused Adam",
                extra="apex",
                unavailable=apex_adam_unavailable,
                key="use_apex_adam",
            ),
        ),
    }
)
"""Operation -> candidates, the fastest first; of Adam, torch's, which skips updates by a flag on the device."""


def choose_kernel(operation: str, facts: KernelFacts, mode: str = "auto", asked: Collection[str] = ()) -> KernelChoice:
    """Returns the candidate that serves an operation.

    A candidate whose key is asked for comes first; then those that the mode allows, in order.

    Args:
        operation: A key of OPERATIONS.
        facts: What decides which kernels can be used.
        mode: The key `kernels`: `auto`, `torch` or `triton`.
        asked: Keys of candidates that are set.
    """
    entries = OPERATIONS[operation]
    by_key = [entry for entry in entries if entry.key in asked]
    allowed = [entry for entry in entries if mode != TORCH or entry.name == TORCH]
    rejected: dict[str, str] = {}
    missing: dict[str, str] = {}
    for entry in dict.fromkeys([*by_key, *allowed]):
        reason = entry.unavailable(facts)
        if reason is None:
            return KernelChoice(operation, entry, rejected, missing)
        rejected[entry.name] = reason
        if entry in by_key and entry.key is not None:
            missing[entry.key] = reason
        elif mode == TRITON and entry.name == TRITON:
            missing["kernels"] = reason
    raise LookupError(f"no kernel serves {operation}: {rejected}")


def choose_all(facts: KernelFacts, section: Any) -> dict[str, KernelChoice]:
    """Returns the choice for every operation. section: the configuration's kernels section, or None."""
    asked = [key for key in keys_of_kernels() if getattr(section, key, False)]
    mode = mode_of(section)
    return {operation: choose_kernel(operation, facts, mode, asked) for operation in OPERATIONS}


def keys_of_kernels() -> tuple[str, ...]:
    """Returns the configuration keys that ask for a kernel by name."""
    return tuple(entry.key for entries in OPERATIONS.values() for entry in entries if entry.key is not None)


def missing_kernels(choices: Iterable[KernelChoice], facts: KernelFacts) -> list[ConfigIssue]:
    """Returns the issues of kernels that were asked for by name and cannot be used.

    A key of the public configuration asks on GPUs only, so that one file serves a laptop too; `kernels: triton` asks
    everywhere.
    """
    reasons: dict[tuple[str, str], list[KernelChoice]] = {}
    for choice in choices:
        for key, reason in choice.missing.items():
            if key == "kernels" or facts.device == "cuda":
                reasons.setdefault((key, reason), []).append(choice)
    return [
        ConfigIssue(
            f"{', '.join(choice.operation for choice in lacking)} cannot use the kernel that is asked for: {reason}",
            key=key,
            value=TRITON if key == "kernels" else True,
            hint="write kernels: auto, which takes the fastest that can be used"
            if key == "kernels"
            else f"leave it out: {', '.join(dict.fromkeys(choice.entry.name for choice in lacking))} serves then",
        )
        for (key, reason), lacking in reasons.items()
    ]
