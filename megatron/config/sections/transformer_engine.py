"""Layers of the Transformer Engine package, for FP8."""

from megatron.config.key import Section, key


class TransformerEngineSection(Section):
    """Which layers come from Transformer Engine, and its FP8 recipe."""

    te_columnparallel: bool = key(False, "Use its column parallel linear layer.")
    te_rowparallel: bool = key(False, "Use its row parallel linear layer.")
    te_layernorm_mlp: bool = key(False, "Use its norm and MLP in one layer.")
    te_mha: bool = key(False, "Use its attention.")
    te_fp8_format: str = key(
        "hybrid", "FP8 format; hybrid is e4m3 forward and e5m2 backward.", choices=("e4m3", "hybrid")
    )
    te_fp8_wgrad: bool = key(True, "Compute weight gradients in FP8.")
    te_fp8_amax_history_len: int = key(1, "Steps of the largest absolute value that set the scale.", unit="steps")
    te_fp8_amax_compute_algo: str = key("most_recent", "How the scale follows from that history.")
    te_fp8_margin: int = key(0, "Bits of headroom in the scale.", unit="bits")
    te_fp8_mha: bool = key(False, "Run its attention in FP8.")
