"""The padded vocabulary, against the reference's rule written as a loop."""

from hypothesis import given
from hypothesis import strategies as st

from megatron.config.derived.vocabulary import padded_vocab_size


def test_public_values():
    assert padded_vocab_size(50257, 128, 1) == 50304
    assert padded_vocab_size(50277, 128, 2) == 50432
    assert padded_vocab_size(512, 128, 1) == 512


@given(vocab=st.integers(1, 5000), divisor=st.integers(1, 200), degree=st.integers(1, 8))
def test_least_multiple(vocab, divisor, degree):
    expected = vocab
    while expected % (divisor * degree):
        expected += 1
    assert padded_vocab_size(vocab, divisor, degree) == expected
