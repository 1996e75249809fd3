"""Splits: the public ranges, and nothing that is lost or served twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.dataset.splits import split_documents, split_shares
from megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("split", "documents", "bounds"),
    [
        # Computed by hand: each share rounded, the surplus taken from the first range.
        ("969, 30, 1", 1000, (969, 999, 1000)),
        ("90/5/5", 100, (90, 95, 100)),
        ("1", 7, (7, 7, 7)),
        ("0.5,0.5", 3, (1, 3, 3)),
        ("100,0,0", 5, (5, 5, 5)),
        ("969,30,1", 10, (10, 10, 10)),
        ("1,1,1", 4, (2, 3, 4)),
        ("0,1,1", 3, (0, 1, 3)),
    ],
)
def test_public_ranges(split, documents, bounds):
    first, second, third = bounds
    assert split_documents(split, documents) == {
        "train": range(first),
        "valid": range(first, second),
        "test": range(second, third),
    }


@given(shares=st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any), documents=st.integers(0, 2000))
def test_every_document_is_in_exactly_one_split(shares, documents):
    ranges = split_documents(",".join(map(str, shares)), documents)
    assert [number for part in ranges.values() for number in part] == list(range(documents))


def test_shares_are_normalised():
    assert split_shares("2, 1, 1") == (0.5, 0.25, 0.25)


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "1,-1", "nan", "inf"])
def test_what_is_not_a_split_is_refused(split):
    with pytest.raises(ConfigError, match="split = "):
        split_shares(split)
