"""What decides which backend serves the attention core of a block. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron.registry.kernels import KernelFacts
from megatron.registry.model import ATTENTION, ATTENTION_ALONE, CAUSAL, FULL_ATTENTION, LINEAR_BIAS, POSITIONS, VANILLA

GLOBAL, FLASH = "global", "flash"
Capability = tuple[int, int]
NO_BIAS, LINEAR, TABLE = "none", "linear", "table"


def torch_version() -> tuple[int, ...] | None:
    """Returns the version of torch, without importing it; None where it is not installed, as a plan needs none."""
    try:
        return tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class AttentionFacts:
    """What decides which backend serves a block."""

    kernels: KernelFacts
    """Facts of all kernels: device, type, packages."""
    kind: str = GLOBAL
    """The kind of block, a name of `attention_config`."""
    head_size: int = 64
    """Features of a head."""
    length: int = 1
    """Sequence length [tokens]."""
    capability: Capability | None = None
    """CUDA capability of the GPU; None where it is not known, which rejects nothing but what one generation has."""
    window: bool = False
    """Whether a sliding window hides keys, in some blocks at least."""
    bias: str = NO_BIAS
    """What positions add to scores: `none`, `linear` (ALiBi) or `table` (any bias by distance)."""
    documents: bool = False
    """Whether tokens attend to their own document only."""
    causal: bool = True
    """Whether tokens see earlier ones only."""
    softcap: bool = False
    """Whether the scores have a bound."""
    sinks: bool = False
    """Whether the softmax sums more than the keys."""
    dropout: bool = False
    """Whether training drops probabilities."""
    deterministic: bool = False
    """Whether only deterministic operations are allowed."""
    torch: tuple[int, ...] | None = field(default_factory=torch_version)
    """Version of torch; None where it is not known, which rejects nothing."""

    @property
    def layout(self) -> bool:
        """Whether a layout of blocks hides keys."""
        return not ATTENTION.entry(self.kind).traits >= FULL_ATTENTION

    @staticmethod
    def of(
        kernels: KernelFacts,
        model: Any,
        *,
        documents: bool,
        deterministic: bool,
        capability: Capability | None = None,
    ) -> AttentionFacts:
        """Returns the facts of a model's blocks of kind `global`; `for_kind` has those of the others.

        Args:
            kernels: Facts of all kernels.
            model: The configuration's model section.
            documents: Whether tokens attend to their own document only.
            deterministic: Whether only deterministic operations are allowed.
            capability: CUDA capability of the GPU, if known.
        """
        positions = POSITIONS.entry(model.pos_emb)
        bias = NO_BIAS
        if "scores" in positions.enters:
            bias = LINEAR if positions.traits >= LINEAR_BIAS else TABLE
        return AttentionFacts(
            kernels,
            head_size=_head_size(model),
            length=model.seq_length,
            capability=capability,
            window=_has_windows(model),
            bias=bias,
            documents=documents,
            causal=getattr(model, "attention_mask", CAUSAL) == CAUSAL,
            softcap=model.attn_logit_softcapping is not None,
            sinks=model.softmax_type != VANILLA,
            dropout=model.attention_dropout > 0,
            deterministic=deterministic,
        )

    def for_kind(self, kind: str) -> AttentionFacts:
        """Returns the facts of blocks of that kind; a sliding window belongs to those without a layout."""
        facts = replace(self, kind=GLOBAL if kind == ATTENTION_ALONE else kind)
        return replace(facts, window=facts.window and not facts.layout)


def _head_size(model: Any) -> int:
    """Returns the width of the heads that a kernel sees: the larger of keys and values in latent attention."""
    width: int = model.kv_channels or model.hidden_size // model.num_attention_heads
    return max(width, model.v_head_dim) if getattr(model, "multi_latent_attention", False) else width


def _has_windows(model: Any) -> bool:
    """Returns whether some type of block, or the model, has a sliding window."""
    types = (model.layer_type_options or {}).values() if model.layer_types else ()
    own = [options.get("sliding_window_width") for options in types if options]
    return any(width is not None for width in (model.sliding_window_width, *own))
