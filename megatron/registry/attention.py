"""The backends of the attention core, each with the reasons why it cannot serve a kind of block.

`choose_backend` is the only function that decides: the plan of a run prints its choice before any worker starts, and
`megatron/kernels/dispatch.py` loads it when a model is built. Needs no torch, like the table of the other kernels.

Facts of the packages: flash-attn 2 (arXiv:2307.08691) and 3 (arXiv:2407.08608), and the CuTe version 4, by the
signatures of their public functions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from megatron.registry.attention_facts import FLASH, GLOBAL, LINEAR, NO_BIAS, TABLE, AttentionFacts, Capability
from megatron.registry.entry import Entry
from megatron.registry.kernels import (
    BF16,
    FP16,
    TORCH,
    KernelChoice,
    mode_of,
    triton_in_blocks,
)

SOFTMAX_KEYS = ("scaled_upper_triang_masked_softmax_fusion", "scaled_masked_softmax_fusion")
LONGEST_SOFTMAX = 16384
"""Keys of a row that one program of Triton's softmax holds."""
LARGEST_HEAD, LARGEST_DETERMINISTIC_HEAD, LARGEST_CUDNN_HEAD, SMALLEST_FLEX_HEAD = 256, 192, 128, 16
PREFERS_CUDNN = (9, 10)
"""Generations of GPUs whose fastest attention in torch is cuDNN's, as torch's own order has it."""
SCORES_IN_MEMORY = frozenset({"scores in memory"})
"""Trait of a backend that saves a value of each query and key for its backward pass."""
FOR_CPUS = frozenset({"for CPUs"})
"""Trait of a backend that is no candidate on GPUs."""
ENCODES = frozenset({"bidirectional"})
"""Trait of a backend for blocks whose tokens see all of their document; the others are causal."""
SUMS_SINKS = frozenset({"sinks"})
"""Trait of a backend whose softmax sums more than the keys; the others sum the keys alone."""
IN_NO_GRAPH = "torch.compile makes one graph of a block, which cannot hold it"


Reason = Callable[[AttentionFacts], str | None]


@dataclass(frozen=True, kw_only=True)
class AttentionEntry(Entry):
    """A backend: the target is a `megatron.kernels.attention.AttentionKernel`."""

    unavailable: Reason
    """Returns the reason why it cannot serve, or None."""
    keys: tuple[str, ...] = ()
    """The configuration keys that ask for it by name; with keys it serves only where one asks."""
    kinds: frozenset[str] = frozenset()
    """Kinds of blocks that ask for it before all others."""


def _for_halves(facts: AttentionFacts) -> str | None:
    """Returns the reason of what computes on GPUs in half precision."""
    if facts.kernels.device != "cuda":
        return f"it is for GPUs, and the model is on {facts.kernels.device}"
    if facts.kernels.dtype not in (FP16, BF16):
        return f"it is for fp16 and bfloat16, and the model is in {facts.kernels.dtype}"
    return None


def _since(facts: AttentionFacts, capability: Capability) -> str | None:
    """Returns the reason of what older GPUs cannot run."""
    if facts.capability is not None and facts.capability < capability:
        return f"it needs a GPU of capability {_dotted(capability)} or later, not {_dotted(facts.capability)}"
    return None


def _of_generations(facts: AttentionFacts, *generations: int) -> str | None:
    """Returns the reason of what only some generations of GPUs run; one that is not known is none of them."""
    if facts.capability is not None and facts.capability[0] in generations:
        return None
    needed = " or ".join(f"{one}.x" for one in generations)
    found = "one that is not known" if facts.capability is None else _dotted(facts.capability)
    return f"it is for GPUs of capability {needed}, not {found}"


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def _head(facts: AttentionFacts, largest: int, multiple: int = 1) -> str | None:
    if facts.head_size > largest:
        return f"its heads have at most {largest} features, not {facts.head_size}"
    if facts.head_size % multiple:
        return f"its heads have a multiple of {multiple} features, not {facts.head_size}"
    return None


def _mask(
    facts: AttentionFacts,
    *,
    window: bool = False,
    documents: bool = False,
    linear: bool = False,
    softcap: bool = False,
) -> str | None:
    """Returns the reason of what lacks a mask or a bias; the flags name those that it has."""
    if facts.layout:
        return f"it has no layout of blocks, as {facts.kind} asks for"
    if facts.window and not window:
        return "it has no sliding window"
    if facts.documents and not documents:
        return "it has no documents (reset_attention_mask)"
    if facts.softcap and not softcap:
        return "it has no bound of scores (softcap)"
    if facts.bias == TABLE or (facts.bias == LINEAR and not linear):
        return "it has no biases of scores, as the positions ask for"
    return None


def _compiled(facts: AttentionFacts) -> str | None:
    """Returns the reason of what asks for a table of documents, which is made for each batch."""
    if facts.kernels.compiled and facts.documents:
        return "torch.compile makes one graph of a block, and the table of documents is made for each batch"
    return None


def _package(facts: AttentionFacts, package: str, name: str, install: str) -> str | None:
    return None if facts.kernels.installed(package) else f"the package {name} is not installed ({install})"


def _first(*reasons: str | None) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def softmax_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why Triton's softmax cannot serve, or None."""
    if facts.kind != GLOBAL:
        return "it is for blocks of kind global"
    if facts.length > LONGEST_SOFTMAX:
        return f"its rows have at most {LONGEST_SOFTMAX} keys, and seq_length is {facts.length}"
    return triton_in_blocks(facts.kernels)


def flash_2_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why flash-attn 2 cannot serve, or None: windows, documents, ALiBi, dropout, any grouping."""
    return _first(
        _for_halves(facts),
        _since(facts, (8, 0)),
        _head(facts, LARGEST_HEAD),
        _mask(facts, window=True, documents=True, linear=True, softcap=True),
        _compiled(facts),
        _package(facts, "flash_attn", "flash-attn", "pip install neox[flash]"),
    )


def flash_3_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why flash-attn 3 cannot serve, or None: windows and documents."""
    return _first(
        _for_halves(facts),
        _of_generations(facts, 9),
        _head(facts, LARGEST_HEAD, 8),
        _mask(facts, window=True, documents=True, softcap=True),
        "it has no dropout" if facts.dropout else None,
        "its backward pass is not deterministic for heads of more than 192 features"
        if facts.deterministic and facts.head_size > LARGEST_DETERMINISTIC_HEAD
        else None,
        _compiled(facts),
        _package(facts, "flash_attn_interface", "flash-attn-3", "built from flash-attention's folder hopper"),
    )


def flash_4_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why flash-attn 4 cannot serve, or None: windows and documents."""
    return _first(
        _for_halves(facts),
        _of_generations(facts, 10),
        _head(facts, 128, 8),
        _mask(facts, window=True, documents=True, softcap=True),
        "it has no dropout" if facts.dropout else None,
        IN_NO_GRAPH if facts.kernels.compiled else None,
        _package(facts, "flash-attn-4", "flash-attn-4", "pip install flash-attn-4"),
    )


def cudnn_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why cuDNN's attention in torch cannot serve, or None."""
    return _first(
        _for_halves(facts),
        _of_generations(facts, *PREFERS_CUDNN),
        _head(facts, LARGEST_CUDNN_HEAD, 8),
        _mask(facts),
        "its backward pass is not deterministic" if facts.deterministic else None,
    )


def torch_flash_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why torch's flash attention cannot serve, or None."""
    return _first(
        _for_halves(facts),
        _since(facts, (8, 0)),
        _head(facts, LARGEST_HEAD),
        _mask(facts),
    )


def varlen_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why torch's flash attention of several documents cannot serve, or None."""
    return _first(
        _for_halves(facts),
        _since(facts, (8, 0)),
        _head(facts, LARGEST_HEAD, 8),
        _mask(facts, window=True, documents=True),
        "it has no dropout" if facts.dropout else None,
        IN_NO_GRAPH if facts.kernels.compiled else None,
        "it needs torch 2.13 or later" if facts.torch is not None and facts.torch < (2, 13) else None,
    )


def flex_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why torch's flexible attention cannot serve, or None."""
    if facts.kernels.device != "cuda":
        return f"it is for GPUs, and the model is on {facts.kernels.device}"
    if facts.head_size < SMALLEST_FLEX_HEAD:
        return f"its heads have at least {SMALLEST_FLEX_HEAD} features, not {facts.head_size}"
    if not (facts.layout or facts.window or facts.documents or facts.softcap or facts.bias != NO_BIAS):
        return "it skips hidden keys, and the causal mask alone is faster elsewhere"
    return _first("it has no dropout" if facts.dropout else None, _compiled(facts))


def blocks_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why the blocks of queries for CPUs cannot serve, or None."""
    return "torch.compile fuses torch's own operators" if facts.kernels.compiled else None


def documents_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why attention of one document after another cannot serve, or None."""
    return IN_NO_GRAPH if facts.kernels.compiled else None


def sinks_unavailable(facts: AttentionFacts) -> str | None:
    """Returns the reason why attention with sinks cannot serve, or None."""
    return IN_NO_GRAPH if facts.kernels.compiled else None


def _softmax(entry: AttentionEntry, facts: AttentionFacts) -> str | None:
    """Returns the reason of a backend whose softmax sums other terms."""
    if facts.sinks == (entry.traits >= SUMS_SINKS):
        return None
    return "its softmax sums the keys alone (softmax_type)" if facts.sinks else "its softmax sums more than the keys"


def _direction(entry: AttentionEntry, facts: AttentionFacts) -> str | None:
    """Returns the reason of a backend for the other kind of mask."""
    if facts.causal == (entry.traits >= ENCODES):
        return "it is bidirectional" if facts.causal else "it is causal"
    return None


_TORCHES = "megatron.kernels.attention"
_PACKAGES = "megatron.kernels.flash_attention"
_ASKS_FLASH = frozenset({FLASH})

ATTENTION_BACKENDS: tuple[AttentionEntry, ...] = (
    AttentionEntry(
        "triton softmax",
        "megatron.kernels.softmax_attention:softmax_attention",
        "Product, one launch for mask and softmax, product; the scores are in memory",
        extra="triton",
        unavailable=softmax_unavailable,
        keys=SOFTMAX_KEYS,
        traits=SCORES_IN_MEMORY,
    ),
    AttentionEntry(
        "sinks",
        "megatron.kernels.sink_attention:sink_attention",
        "A logit of each head besides the keys; sums by the blocks for CPUs or torch's flash attention",
        unavailable=sinks_unavailable,
        traits=SUMS_SINKS,
    ),
    AttentionEntry("cudnn", f"{_TORCHES}:cudnn_attention", "cuDNN's, in torch", unavailable=cudnn_unavailable),
    AttentionEntry(
        "torch flash",
        f"{_TORCHES}:torch_flash_attention",
        "Torch's flash attention",
        unavailable=torch_flash_unavailable,
    ),
    AttentionEntry(
        "torch varlen",
        f"{_PACKAGES}:varlen_attention",
        "Torch's flash attention of documents and windows, without a mask",
        unavailable=varlen_unavailable,
    ),
    AttentionEntry(
        "flash-attn 3",
        f"{_PACKAGES}:flash_3_attention",
        "Package for Hopper, arXiv:2407.08608",
        extra="flash",
        unavailable=flash_3_unavailable,
        kinds=_ASKS_FLASH,
    ),
    AttentionEntry(
        "flash-attn 4",
        f"{_PACKAGES}:flash_4_attention",
        "Package for Blackwell",
        extra="flash",
        unavailable=flash_4_unavailable,
        kinds=_ASKS_FLASH,
    ),
    AttentionEntry(
        "flash-attn 2",
        f"{_PACKAGES}:flash_2_attention",
        "Package for every GPU since Ampere, arXiv:2307.08691",
        extra="flash",
        unavailable=flash_2_unavailable,
        kinds=_ASKS_FLASH,
    ),
    AttentionEntry(
        "flex", f"{_TORCHES}:gpu_attention", "Torch's flexible attention, compiled", unavailable=flex_unavailable
    ),
    AttentionEntry(
        "documents",
        "megatron.kernels.bidirectional_attention:document_attention",
        "Bidirectional, one document after another",
        unavailable=documents_unavailable,
        traits=FOR_CPUS | ENCODES,
    ),
    AttentionEntry(
        "torch bidirectional",
        "megatron.kernels.bidirectional_attention:bidirectional_attention",
        "scaled_dot_product_attention, under a mask where there are several documents",
        unavailable=lambda facts: None,
        traits=ENCODES,
    ),
    AttentionEntry(
        "cpu blocks",
        f"{_TORCHES}:cpu_attention",
        "Blocks of queries against the keys that they see; dropout under a mask",
        unavailable=blocks_unavailable,
        traits=FOR_CPUS,
    ),
    AttentionEntry(
        TORCH,
        f"{_TORCHES}:sdpa_attention",
        "scaled_dot_product_attention, under a mask where keys are hidden",
        unavailable=lambda facts: None,
    ),
)
"""The backends, the preferred first; blocks of kind `flash` take the package before torch's."""


def choose_backend(facts: AttentionFacts, mode: str = "auto", asked: Collection[str] = ()) -> KernelChoice:
    """Returns the backend that serves a kind of block, and why those before it do not.

    Args:
        facts: What decides.
        mode: The key `kernels`: with `torch` the packages serve only blocks of kind `flash`.
        asked: Keys of backends that are set.
    """
    by_key = [entry for entry in ATTENTION_BACKENDS if facts.kind == GLOBAL and set(entry.keys) & set(asked)]
    by_kind = [entry for entry in ATTENTION_BACKENDS if facts.kind in entry.kinds]
    allowed = [entry for entry in ATTENTION_BACKENDS if not entry.keys and (mode != TORCH or entry.extra is None)]
    if facts.kernels.device != "cpu":
        allowed = [entry for entry in allowed if not entry.traits >= FOR_CPUS]
    rejected: dict[str, str] = {}
    missing: dict[str, str] = {}
    for entry in dict.fromkeys([*by_key, *by_kind, *allowed]):
        reason = _direction(entry, facts) or _softmax(entry, facts) or entry.unavailable(facts)
        if reason is None:
            return KernelChoice(f"attention ({facts.kind})", entry, rejected, missing)
        rejected[entry.name] = reason
        missing |= {key: reason for key in entry.keys if key in asked}
    raise LookupError(f"no kernel serves blocks of kind {facts.kind}: {rejected}")


def choose_backends(facts: AttentionFacts, kinds: Collection[str], section: Any) -> dict[str, KernelChoice]:
    """Returns kind of block -> choice.

    Args:
        facts: Facts of the model.
        kinds: Kinds of blocks that have attention.
        section: The configuration's kernels section, or None.
    """
    asked = [key for key in SOFTMAX_KEYS if getattr(section, key, False)]
    return {kind: choose_backend(facts.for_kind(kind), mode_of(section), asked) for kind in dict.fromkeys(kinds)}
