"""Layers of the Transformer Engine package, for NVIDIA GPUs, and FP8."""

from megatron.config.field import Section, key
from megatron.registry import TE_LAYERS


class TransformerEngineSection(Section):
    """Layers of Transformer Engine, and its FP8 recipe."""

    te_columnparallel: bool = key(False, "Use it for column-parallel layers of attention and MLP.")
    te_rowparallel: bool = key(False, "Use it for row-parallel layers of attention and MLP.")
    te_layernorm_mlp: bool = key(False, "Use its fused layer for the norm before the MLP and the MLP.")
    te_mha: bool = key(False, "Use it for attention: the core and its projections.")
    te_fp8_format: str = key(
        "hybrid", "FP8 format; hybrid is e4m3 forward and e5m2 backward.", choices=("e4m3", "hybrid")
    )
    te_fp8_wgrad: bool = key(True, "Compute weight gradients in FP8 too.")
    te_fp8_amax_history_len: int = key(1, "Steps of the largest absolute value that set the scale.", unit="steps")
    te_fp8_amax_compute_algo: str = key(
        "most_recent", "Which value of that history sets the scale.", choices=("most_recent", "max")
    )
    te_fp8_margin: int = key(0, "Bits of headroom in the scale.", unit="bits")
    te_fp8_mha: bool = key(False, "Compute its layers, attention included, in FP8 in training.")

    @property
    def layers(self) -> tuple[str, ...]:
        """The keys of the layers that are switched on."""
        return tuple(name for name in TE_LAYERS.names if getattr(self, name))
