"""Draws docs/images/attention.png: which tokens each kind of attention sees in a sequence of 64.

Run it with matplotlib installed: python docs/draw_attention.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.kernels.attention_patterns import AttentionMask, BlockPattern, Window
from megatron.block_sparsity import layout_of, visible_share

LENGTH, BLOCK = 64, 4
KINDS: list[tuple[str, str, dict[str, Any] | None, int | None]] = [
    ("global, flash", "global", None, None),
    ("global or flash with\nsliding_window_width: 12", "global", None, 12),
    ("local\nnum_local_blocks: 4", "local", {"num_local_blocks": 4}, None),
    ("sparse_fixed\nnum_local_blocks: 4", "sparse_fixed", {"num_local_blocks": 4}, None),
    (
        "sparse_variable\nlocal_window_blocks: [1, 2, 4]",
        "sparse_variable",
        {"local_window_blocks": [1, 2, 4]},
        None,
    ),
    ("bigbird\nnum_random_blocks: 1", "bigbird", {}, None),
    ("bslongformer\nglobal_block_indices: [0, 6]", "bslongformer", {"global_block_indices": [0, 6]}, None),
    (
        "sparse_fixed, one head of four\nnum_different_global_patterns: 4",
        "sparse_fixed",
        {"num_local_blocks": 4, "num_different_global_patterns": 4, "different_layout_per_head": True},
        None,
    ),
]


def main() -> None:
    """Writes the picture."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 6.3))
    positions = torch.arange(LENGTH)
    for axis, (title, kind, options, window) in zip(axes.flat, KINDS, strict=True):
        config = None if options is None else {"block": BLOCK, **options}
        layout = layout_of(kind, config, 0)
        pattern = Window(window) if window else None
        head = 2 if options and "different_layout_per_head" in options else 0
        mask = AttentionMask(pattern if layout is None else BlockPattern(layout, range(head, head + 1)))
        seen = mask.seen(positions[None, :, None], positions[None, None]).reshape(LENGTH, LENGTH)
        axis.imshow(seen, cmap=ListedColormap(["#f6f8fa", "#1f6feb"]), vmin=0, vmax=1, interpolation="nearest")
        share = visible_share(kind, config, 0, window, LENGTH)
        axis.set_title(f"{title}\n{100 * share:.0f} % of the causal half", fontsize=8.5)
        axis.set_xticks([0, 15, 31, 47, 63], ["1", "16", "32", "48", "64"], fontsize=7)
        axis.set_yticks([0, 15, 31, 47, 63], ["1", "16", "32", "48", "64"], fontsize=7)
    for axis in axes[1]:
        axis.set_xlabel("key", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("query", fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "images" / "attention.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
