"""Block layouts against those that DeepSpeed 0.14 made (its sparsity_config.py was run once), and what ours promise."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.block_sparsity import SPARSE_KINDS, layout_of, visible_share

# Kind, options (blocks of 8 tokens in a sequence of 64), head -> a line for each row of blocks.
DEEPSPEEDS: list[tuple[str, dict[str, Any], int, str]] = [
    ("local", {"num_local_blocks": 4}, 0, "# ## ### .### ..### ...### ....### .....###"),
    ("local", {"num_sliding_window_blocks": 4}, 0, "# ## ### .### ..### ...### ....### .....###"),
    ("sparse_fixed", {"num_local_blocks": 3}, 0, "# ## ### ..## ..### ..#### ..#..## ..#..###"),
    ("sparse_fixed", {}, 0, "# ## ### #### ...## ...### ...#### ...#####"),
    ("sparse_variable", {}, 0, "# ## ### #### #...# #...## #...### #...####"),
    (
        "sparse_variable",
        {"local_window_blocks": [1, 2], "global_block_indices": [2]},
        0,
        "# .# .## ..## ..### ..#..# ..#..## ..#....#",
    ),
    ("bigbird", {"num_random_blocks": 0, "num_global_blocks": 2}, 0, "# ## ### #### ##.## ##..## ##...## ##....##"),
    ("bslongformer", {}, 0, "# ## ### #.## #..## #...## #....## #.....##"),
    ("bslongformer", {"global_block_indices": [0, 4]}, 0, "# ## ### #.## ##### #...## #...### #...#.##"),
    (
        "bslongformer",
        {"num_sliding_window_blocks": 2, "global_block_indices": [1, 4], "global_block_end_indices": [3, 5]},
        0,
        "# ## ### .### ##### .##.## .##.### .##.#.##",
    ),
]
_HEADS = {"different_layout_per_head": True, "num_different_global_patterns": 4}
DEEPSPEEDS += [
    ("sparse_fixed", _HEADS, head, f"# ## ### #### {dots}#{rest}# {dots}#{rest}## {dots}#{rest}### {dots}#{rest}####")
    for head, dots, rest in [(0, "...", ""), (1, "..", "."), (2, ".", ".."), (3, "", "...")]
]


@pytest.mark.parametrize(("kind", "options", "head", "expected"), DEEPSPEEDS)
def test_layouts_are_deepspeeds(kind: str, options: dict[str, Any], head: int, expected: str) -> None:
    layout = layout_of(kind, {"block": 8, **options}, 0)
    assert layout is not None
    rows = [set(layout.seen(row, head)) for row in range(8)]
    assert ["".join("#" if column in seen else "." for column in range(max(seen) + 1)) for seen in rows] == (
        expected.split()
    )


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_every_row_sees_itself_and_nothing_later(kind: str) -> None:
    layout = layout_of(kind, None, 5)
    assert layout is not None
    assert layout.block == 16
    for row in range(40):
        seen = layout.seen(row)
        assert row in seen
        assert seen == sorted(set(seen))
        assert seen[0] >= 0
        assert seen[-1] == row


def test_random_blocks_are_drawn_by_block_head_and_row_alone() -> None:
    """Fails when they depend on the run, so that a checkpoint would mean another model elsewhere."""
    options = {"num_random_blocks": 2, "num_sliding_window_blocks": 1, "different_layout_per_head": True}

    def drawn(number: int, head: int) -> list[list[int]]:
        layout = layout_of("bigbird", options, number)
        assert layout is not None
        return [layout.seen(row, head) for row in range(60)]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0) != drawn(1, 0)
    extra = [len(seen) - 2 for seen in drawn(0, 0)[20:]]  # beside the first block and the row's own
    assert set(extra) <= {0, 1, 2}
    assert sum(extra) > 1.5 * len(extra)
    assert drawn(0, 0)[:3] == [[0], [0, 1], [0, 1, 2]]  # all that there is


def test_visible_shares() -> None:
    """By hand: pairs of a query and a key at or before it."""
    assert visible_share("global", None, 0, None, 64) == 1
    assert visible_share("flash", None, 0, 100, 64) == 1
    assert visible_share("global", None, 0, 4, 8) == pytest.approx((1 + 2 + 3 + 4 * 5) / 36)
    # local with one earlier block of 2: rows of blocks see 1, 2, 2, 2 blocks, each without the half above the diagonal.
    share = visible_share("local", {"block": 2, "num_local_blocks": 2}, 0, None, 8)
    assert share == pytest.approx((0.5 + 1.5 * 3) / (0.5 + 1.5 + 2.5 + 3.5))
    assert visible_share("sparse_fixed", None, 0, None, 131072) < 0.26
