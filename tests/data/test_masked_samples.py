"""Masked samples, against a plain loop over lists that follows the public rule word for word, and by their shares.

The plain loop draws from the same generators; that they are C++'s says the standard, which lists their 10,000th number.
tests/data/test_megatron_core.py compares samples with Megatron-Core's own, number by number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from megatron.config.schema.data import DataSection
from megatron.data.dataset import numba_loops
from megatron.data.dataset.builder import build_data, epoch_samples
from megatron.data.dataset.gpt_dataset import SampleExtras, TokenSource
from megatron.data.dataset.masked_builder import MaskedData
from megatron.data.dataset.masked_dataset import MaskedSettings, PackedDocuments, SentencePairs
from megatron.data.dataset.masking import MaskingRule
from megatron.data.dataset.mersenne_twister import Draws32, draws_64
from megatron.data.dataset.sentence_map import build_sentence_map
from megatron.data.indexed.reader import IGNORE_INDEX
from megatron.data.indexed.sentences import SentenceDataset
from megatron.data.indexed.writer import DatasetWriter
from megatron.errors import ConfigError, RunError
from megatron.tokenizer_info import MaskingTokens

VOCABULARY, FIRST_PIECE = 300, 200
PAD, CLS, SEP, MASK = 0, 2, 3, 4
TOKENS = MaskingTokens(CLS, SEP, MASK, PAD, VOCABULARY, bytes(number >= FIRST_PIECE for number in range(VOCABULARY)))
SEED = 77


def write(prefix, documents):
    """A data set of documents of sentences."""
    with DatasetWriter(prefix, np.dtype("<u2")) as writer:
        for sentences in documents:
            sizes = np.array([len(one) for one in sentences])
            writer.add_documents(np.concatenate(sentences), sizes, np.array([len(sentences)]))
    return str(prefix)


def documents(count=30, least=1, longest=13, seed=1):
    generator = np.random.default_rng(seed)
    return [
        [
            generator.integers(5, VOCABULARY, generator.integers(1, 25))
            for _ in range(generator.integers(least, longest))
        ]
        for _ in range(count)
    ]


def test_random_numbers_are_those_of_the_standard():
    """[rand.predef] of the C++ standard: the 10,000th number of each generator with its default seed, 5489."""
    draws = Draws32(5489)
    assert draws.peek(3).tolist() == draws.peek(10_000)[:3].tolist()
    draws.take(9_999)
    assert draws.peek(1).tolist() == [4123659995]
    assert int(draws_64(5489, 10_000)[-1]) == 9981545732273789042


def plain_rows(bounds, sizes, max_length, short, least, seed, samples):
    """Rows of sentences as the public rule makes them, a sentence at a time."""
    numbers = iter(np.random.RandomState(seed).randint(0, 2**32, 10**5, dtype=np.uint32).tolist())

    def target():
        if not short:
            return max_length
        number = next(numbers)
        return 2 + number % (max_length - 1) if number % round(1 / short) == 0 else max_length

    rows = []
    while len(rows) < samples:
        for first, end in pairwise(bounds):
            own = sizes[first:end]
            if len(own) < least or (len(own) > 1 and max(own) > 512):
                continue
            goal, start, length = target(), first, 0
            for at in range(first, end):
                length += sizes[at]
                left = end - at - 1
                if (length >= goal and left > 1 and at + 1 - start >= least) or left == 0:
                    rows.append((start, at + 1, goal))
                    goal, start, length = target(), at + 1, 0
    for at, number in zip(range(len(rows) - 1, 0, -1), draws_64(seed + 1, len(rows)).tolist(), strict=False):
        other = number % (at + 1)
        rows[at], rows[other] = rows[other], rows[at]
    return rows


@pytest.mark.parametrize(("short", "least"), [(0.1, 2), (0.5, 1), (0.0, 2)])
def test_rows_follow_the_public_rule(short, least, monkeypatch):
    generator = np.random.default_rng(4)
    counts = generator.integers(0, 9, 40)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    sizes = generator.integers(1, 60, bounds[-1]).astype(np.int32)
    sizes[[5, 50]] = 600
    settings = {"max_length": 61, "short_seq_prob": short, "least": least, "seed": 9, "samples": 200}
    made = build_sentence_map(bounds, sizes, **settings)
    assert made.rows.tolist() == [list(row) for row in plain_rows(bounds, sizes.tolist(), 61, short, least, 9, 200)]
    assert made.epochs > 1
    monkeypatch.setattr(numba_loops, "worth_compiling", lambda turns, least: True)
    compiled = build_sentence_map(bounds, sizes, **settings)
    np.testing.assert_array_equal(compiled.rows, made.rows)


def plain_sample(sentences, target, length, order, random):
    """Tokens, labels, types and order of one sample, with lists and numpy's own choice."""
    pivot, swapped = len(sentences), False
    if order:
        pivot = random.randint(1, len(sentences)) if len(sentences) >= 3 else 1
        swapped = random.random_sample() < 0.5
    a, b = list(chain(*sentences[:pivot])), list(chain(*sentences[pivot:]))
    if swapped:
        a, b = b, a
    while len(a) + len(b) > target:
        longer = a if len(a) > len(b) else b
        del longer[0 if random.random_sample() < 0.5 else -1]
    tokens, types = [CLS, *a, SEP], [0] * (len(a) + 2)
    if b:
        tokens, types = [*tokens, *b, SEP], [*types, *[1] * (len(b) + 1)]
    words = []
    for at, token in enumerate(tokens):
        if token in (CLS, SEP):
            continue
        if token >= FIRST_PIECE and words:
            words[-1].append(at)
        else:
            words.append([at])
    limit = min(0.15 * target, max(1, round(len(tokens) * 0.15)))
    shares = np.array([1, 1 / 2, 1 / 3])
    starts = list(range(len(words)))
    random.shuffle(starts)
    masked, labels = list(tokens), {}
    for start in starts:
        if len(labels) >= limit:
            break
        count = random.choice([1, 2, 3], p=shares / shares.sum())
        grams = [list(chain(*words[start : start + size])) for size in range(count, 0, -1)]
        fitting = [gram for gram in grams if len(labels) + len(gram) <= limit]
        if not fitting or any(at in labels for at in fitting[0]):
            continue
        for at in fitting[0]:
            labels[at] = tokens[at]
            if random.random_sample() < 0.8:
                masked[at] = MASK
            elif random.random_sample() >= 0.5:
                masked[at] = random.randint(0, VOCABULARY)
    rest = length - len(tokens)
    row = [labels.get(at, IGNORE_INDEX) for at in range(length)]
    return masked + [PAD] * rest, row, types + [0] * rest, int(swapped), len(tokens)


@dataclass
class Row:
    tokens: np.ndarray
    extras: SampleExtras

    @staticmethod
    def read(samples, number):
        length = samples.sample_length
        tokens = np.empty(length, np.int64)
        extras = SampleExtras(
            labels=np.empty(length, np.int64),
            borders=np.zeros(length, bool),
            padding=np.zeros(length, bool),
            token_types=np.empty(length, np.int64),
            sentence_order=np.zeros(1, np.int64),
        )
        samples.read(number, tokens, extras)
        return Row(tokens, extras)


def pairs(prefix, length, order, count=150):
    data = SentenceDataset(prefix)
    index = build_sentence_map(
        data.bounds,
        data.sentence_sizes,
        max_length=length - 3,
        short_seq_prob=0.3,
        least=2 if order else 1,
        seed=SEED,
        samples=count,
    )
    settings = MaskedSettings(MaskingRule(TOKENS), SEED, length, order)
    return SentencePairs(TokenSource(data), index, settings), index


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("length", [32, 128])
def test_padded_samples_follow_the_public_rule(tmp_path, length, order):
    made = documents(least=2)
    samples, index = pairs(write(tmp_path / "d", made), length, order)
    flat = [sentence.tolist() for document in made for sentence in document]
    for number in range(len(samples)):
        found = Row.read(samples, number)
        first, end, target = index.rows[number].tolist()
        random = np.random.RandomState(SEED + number)
        expected = plain_sample(flat[first:end], target, length, order, random)
        tokens, labels, types, swapped, filled = expected
        assert found.tokens.tolist() == tokens
        assert found.extras.labels.tolist() == labels
        assert found.extras.token_types.tolist() == types
        assert found.extras.sentence_order.tolist() == [swapped]
        assert np.flatnonzero(found.extras.padding).tolist() == list(range(filled, length))
        assert np.flatnonzero(found.extras.borders).tolist() == [0, *([filled] if filled < length else [])]


def packed(prefix, length=40, count=60, rule=None):
    data = DataSection(data_path=prefix, split="1,0,0", num_workers=0)
    masked = MaskedData(TOKENS, sentence_order=False, packed=True)
    loader = built(data, masked, length, train=count).train
    samples = loader.samples
    assert isinstance(samples, PackedDocuments)
    return (
        samples
        if rule is None
        else PackedDocuments(samples._source, samples._index, replace(samples._settings, rule=rule))
    )


def built(data, masked, length=64, train=20, rank=0, ranks=1, micro=2, seed=SEED):
    return build_data(
        data,
        eod=SEP,
        seq_length=length,
        seed=seed,
        micro_batch=micro,
        data_rank=rank,
        data_size=ranks,
        train_samples=train,
        valid_samples=0,
        test_samples=0,
        is_builder=True,
        barrier=lambda: None,
        masked=masked,
    )


def test_packed_samples_hold_every_document_and_nothing_else(tmp_path):
    """Rows in the order of the index map are [CLS] document [SEP] after each other, cut every `length` tokens."""
    made = documents(12)
    nothing = MaskingRule(TOKENS, mask_prob=1e-9)  # one token a sample, which the labels give back
    samples = packed(write(tmp_path / "d", made), count=20, rule=nothing)
    index = samples._index
    stream = [token for d in index.documents for token in (CLS, *np.concatenate(made[d]).tolist(), SEP)]
    begins = {0, *np.cumsum([sum(map(len, made[d])) + 2 for d in index.documents]).tolist()}
    for number in range(len(samples)):
        found, row = Row.read(samples, number), int(index.shuffle[number])
        restored = np.where(found.extras.labels >= 0, found.extras.labels, found.tokens)
        start = row * 40
        assert restored.tolist() == stream[start : start + 40]
        inside = {at - start for at in begins if start <= at < start + 40}
        assert set(np.flatnonzero(found.extras.borders).tolist()) == inside | {0}
        assert not found.extras.padding.any()


def stream_of(samples) -> Iterator[Row]:
    return (Row.read(samples, number) for number in range(len(samples)))


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_shares_of_what_is_masked(tmp_path, kind):
    """15 % of tokens, full words; of these 80 % the mask, 10 % stored, 10 % another id; half of the orders swapped."""
    prefix = write(tmp_path / "d", documents(60, least=4, longest=12))
    samples = packed(prefix, 120, 150) if kind == "packed" else pairs(prefix, 120, True, 300)[0]
    real = chosen = masked = same = swapped = 0
    for row in stream_of(samples):
        labels = row.extras.labels
        at = np.flatnonzero(labels >= 0)
        before = np.where(labels >= 0, labels, row.tokens)
        assert not np.isin(before[at], (CLS, SEP)).any()
        words = np.cumsum((before < FIRST_PIECE) | np.isin(before, (CLS, SEP)))
        inside = ~row.extras.padding & ~np.isin(before, (CLS, SEP))
        if kind == "packed":  # there no piece joins a word behind a separator
            for word in np.unique(words[at]):
                own = inside & (words == word)
                assert (labels[own] >= 0).all()
        real += int((~row.extras.padding).sum())
        chosen += len(at)
        masked += int((row.tokens[at] == MASK).sum())
        same += int((row.tokens[at] == labels[at]).sum())
        swapped += int(row.extras.sentence_order[0])
    assert chosen / real == pytest.approx(0.15, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.03)
    assert same / chosen == pytest.approx(0.1, abs=0.02)
    if kind == "padded":
        assert swapped / len(samples) == pytest.approx(0.5, abs=0.1)


def test_batches_of_two_ranks_are_those_of_one_and_any_batch_starts_anywhere(tmp_path):
    data = DataSection(data_path=write(tmp_path / "d", documents(least=2)), split="1,0,0", num_workers=2)
    masked = MaskedData(TOKENS, sentence_order=True, packed=False)
    full = list(built(data, masked, micro=4).train.batches())
    halves = [list(built(data, masked, rank=rank, ranks=2).train.batches()) for rank in (0, 1)]
    later = list(built(data, masked, micro=4).train.batches(8))
    for name in ("tokens", "labels", "loss_mask", "document_starts", "token_types", "sentence_order"):
        both = [torch.cat([getattr(a, name), getattr(b, name)]) for a, b in zip(*halves, strict=True)]
        assert all(map(torch.equal, both, [getattr(each, name) for each in full]))
        assert all(
            map(torch.equal, [getattr(each, name) for each in later], [getattr(each, name) for each in full[2:]])
        )
    first = full[0]
    assert first.inputs.shape == (2, 4, 64)
    filled = (first.document_starts == 0).sum(1)
    assert torch.equal(first.document_starts[0, filled[0] :], filled[0].expand(64 - int(filled[0])))
    other = next(built(data, masked, micro=4, seed=SEED + 1).train.batches())
    assert not torch.equal(other.tokens, first.tokens)


def test_a_stored_index_map_is_the_one_that_was_made(tmp_path):
    prefix = write(tmp_path / "d", documents(least=2))
    data = DataSection(data_path=prefix, split="1,0,0", num_workers=0)
    masked = MaskedData(TOKENS, sentence_order=True, packed=False)
    first, again = (built(data, masked).train.samples._rows.copy() for _ in range(2))
    assert np.array_equal(first, again)
    (stored,) = tmp_path.glob("d_train_indexmap_*_sentence_idx.npy")
    np.save(stored, np.load(stored)[::-1, [1, 0, 2]])  # sentences that end before they start
    assert np.array_equal(built(data, masked).train.samples._rows, first)


def test_errors_name_what_is_missing(tmp_path):
    single = DataSection(data_path=write(tmp_path / "one", documents(5, 1, 2)), split="1,0,0", num_workers=0)
    with pytest.raises(ConfigError, match=r"none has two sentences.*--split-sentences, or set bert_binary_head: false"):
        built(single, MaskedData(TOKENS, sentence_order=True, packed=False))
    assert built(single, MaskedData(TOKENS, sentence_order=False, packed=False)).train is not None
    long = [[np.full(600, 9), np.full(5, 9)]]
    data = DataSection(data_path=write(tmp_path / "long", long), split="1,0,0", num_workers=0)
    with pytest.raises(ConfigError, match="each has a sentence of more than 512 tokens"):
        built(data, MaskedData(TOKENS, sentence_order=True, packed=False))
    foreign = DataSection(data_path=write(tmp_path / "f", [[np.array([7, 400]), np.array([8])]]), split="1,0,0")
    loader = built(replace_workers(foreign), MaskedData(TOKENS, sentence_order=True, packed=False)).train
    with pytest.raises(RunError, match="document 0 holds the id 400, and the tokenizer's ids are 0 to 299"):
        next(loader.batches())


def replace_workers(data):
    return data.model_copy(update={"num_workers": 0})


@pytest.mark.parametrize("packed_too", [False, True])
def test_passes_give_the_samples_of_all_documents(tmp_path, packed_too):
    """Two passes of padded samples have twice the rows of one; packed ones have all tokens but those of the last."""
    made = documents(least=2)
    data = DataSection(data_path=write(tmp_path / "d", made), split="1,0,0", num_workers=0)
    masked = MaskedData(TOKENS, sentence_order=not packed_too, packed=packed_too, short_seq_prob=0.0)
    settings = {"seq_length": 64, "seed": SEED, "is_builder": True, "barrier": lambda: None, "masked": masked}
    one, two = (epoch_samples(data, epochs=epochs, **settings) for epochs in (1, 2))
    if packed_too:
        tokens = sum(len(sentence) for document in made for sentence in document) + 2 * len(made)
        assert (one, two) == ((tokens - 1) // 64, (2 * tokens - 1) // 64)
    else:
        assert two == 2 * one
        bounds = np.concatenate([[0], np.cumsum([len(document) for document in made])])
        sizes = [len(sentence) for document in made for sentence in document]
        assert one == len(plain_rows(bounds, sizes, 61, 0.0, 2, SEED, 1))
