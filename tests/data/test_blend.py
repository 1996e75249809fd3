"""Blending, against the greedy rule in exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.dataset.blend import BlendedDataset, blend_order, greedy_order, samples_asked


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.integers(1, 64), min_size=1, max_size=6), samples=st.integers(0, 300))
def test_equals_the_rule(parts, samples):
    # Shares that binary floating point holds exactly, so that both sides see the same ties.
    parts.append(2 ** int(np.ceil(np.log2(sum(parts) + 1))) - sum(parts))
    total = sum(parts)
    counts, expected = [0] * len(parts), []
    for sample in range(samples):
        behind = [Fraction(part, total) * max(sample, 1) - count for part, count in zip(parts, counts, strict=True)]
        chosen = behind.index(max(behind))
        expected.append((chosen, counts[chosen]))
        counts[chosen] += 1
    sets, numbers = blend_order([part / total for part in parts], samples)
    assert list(zip(sets.tolist(), numbers.tolist(), strict=True)) == expected


@pytest.mark.parametrize("count", [65, 255, 256, 300, 1000])
def test_many_sets_are_drawn_by_the_same_rule(count):
    """Compared at once or one by one, and in numbers that hold all sets."""
    weights = np.random.default_rng(count).random(count)
    weights /= weights.sum()
    sets, numbers = greedy_order(weights.tolist(), 3000)
    counts, expected = [0] * count, []
    for sample in range(3000):
        behind = [
            weight * max(float(sample), 1.0) - taken for weight, taken in zip(weights.tolist(), counts, strict=True)
        ]
        chosen = behind.index(max(behind))
        expected.append((chosen, counts[chosen]))
        counts[chosen] += 1
    assert list(zip(sets.tolist(), numbers.tolist(), strict=True)) == expected


def test_shares_are_retained():
    sets, _ = blend_order([0.7, 0.2, 0.1], 10_000)
    assert np.abs(np.bincount(sets) - [7000, 2000, 1000]).max() <= 2


@pytest.mark.parametrize("weights", [[0.0, 1.0], [1.0, 0.0], [0.0, 0.5, 0.5], [0.25, 0.0, 0.75], [0.0, 0.0, 1.0]])
def test_nothing_comes_from_a_set_of_weight_zero(weights):
    sets, numbers = blend_order(weights, 200)
    counts = np.bincount(sets, minlength=len(weights))
    assert [count == 0 for count in counts] == [weight == 0 for weight in weights]
    assert np.abs(counts - 200 * np.asarray(weights)).max() < 1
    for chosen in set(sets.tolist()):
        np.testing.assert_array_equal(numbers[sets == chosen], np.arange(counts[chosen]))


@pytest.mark.parametrize(
    ("weight", "samples", "drawn", "asked"), [(0.5, 1000, 500, 503), (1.0, 100, 100, 101), (0.1, 10, 3, 3)]
)
def test_each_set_is_asked_for_a_little_more(weight, samples, drawn, asked):
    assert samples_asked(weight, samples, drawn) == asked


class Counting:
    sample_length = 2

    def __init__(self, mark):
        self.mark = mark

    def __len__(self):
        return 5

    def read(self, number, out, extras=None):
        out[:] = self.mark, number


def test_samples_come_from_the_set_that_the_order_names():
    blended = BlendedDataset([Counting(100), Counting(200)], *blend_order([0.75, 0.25], 6))
    out = np.empty((len(blended), 2), int)
    for number in range(len(blended)):
        blended.read(number, out[number])
    # 0: tie on 0.75; 1: set 1 at 0.25 against -0.25; then by hand.
    assert out.tolist() == [[100, 0], [200, 0], [100, 1], [100, 2], [100, 3], [200, 1]]
    with pytest.raises(IndexError):
        blended.read(6, out[0])
