"""Samples of whole documents, against a walk over the documents and through build_data with real files."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.schema.data import DataSection
from megatron.data.dataset.builder import build_data, epoch_samples
from megatron.data.dataset.packing import build_unpacked_map, has_labels, usable_documents
from megatron.data.dataset.summary import UnpackedSummary
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter
from megatron.errors import ConfigError
from tests.data.test_build import EOD, build, documents, served, write

PACKINGS = ("unpacked", "pack_until_overflow")


def walked(sizes, order, capacity):
    """The documents of each sample, one document after another."""
    samples, room = [], 0
    for document in order:
        length = min(int(sizes[document]), capacity)
        if not samples or length > room:
            samples.append([])
            room = capacity
        samples[-1].append(int(document))
        room -= length
    return samples


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=15).filter(any),
    seq_length=st.integers(1, 20),
    required=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    packed=st.booleans(),
)
def test_equals_the_walk(sizes, seq_length, required, seed, packed):
    sizes = np.array(sizes, np.int32)
    usable = usable_documents(sizes, range(len(sizes)), seq_length=seq_length, chopped=True)
    assert usable.tolist() == [number for number, size in enumerate(sizes) if size]
    made = build_unpacked_map(sizes, usable, seq_length=seq_length, packed=packed, seed=seed, samples=required)
    firsts = made.samples[:, 0].tolist()
    held = [made.documents[first:last].tolist() for first, last in itertools.pairwise(firsts)]
    passes = made.documents.reshape(made.epochs, -1)
    assert all(sorted(row) == usable.tolist() for row in passes.tolist())
    per_pass = [walked(sizes, row, seq_length + 1) if packed else [[one] for one in row] for row in passes.tolist()]
    assert held == [sample for samples in per_pass for sample in samples]
    # Each pass is served to its end, in an order of its own, and there is no pass too many.
    ends = np.cumsum([len(samples) for samples in per_pass]).tolist()
    for first, last in zip([0, *ends], ends, strict=False):
        assert sorted(made.shuffle[first:last].tolist()) == list(range(first, last))
    assert len(made) == ends[-1] >= required
    assert ends[-2:-1] < [required]


def test_long_documents_are_left_out_unless_chopped():
    sizes = np.array([4, 9, 5, 6], np.int32)
    assert usable_documents(sizes, range(4), seq_length=4, chopped=False).tolist() == [0, 2]
    assert usable_documents(sizes, range(1, 4), seq_length=4, chopped=True).tolist() == [1, 2, 3]


def test_documents_without_labels_are_found(tmp_path, monkeypatch):
    """The first token is no label, and neither is one that is cut off."""
    labels = [[5, -100, -100], [], [-100, 7], [-100, -100, -100, -100, 3], [-100, -100, 9]]
    with DatasetWriter(tmp_path / "l", np.dtype("<i4")) as writer:
        for document in labels:
            writer.add_document(np.array(document, np.int64))
    monkeypatch.setattr("megatron.data.dataset.packing.BLOCK", 2)
    data = IndexedDataset(tmp_path / "l")
    assert has_labels(data, range(5), 3).tolist() == [False, False, True, False, True]
    assert has_labels(data, range(1, 4), 4).tolist() == [False, True, True]


@pytest.mark.parametrize("packing", PACKINGS)
def test_splits_keep_to_their_documents(tmp_path, packing):
    """Validation never serves what training reads."""
    section = DataSection(data_path=write(tmp_path / "p", documents(20)), split="8,1,1", pack_impl=packing)
    data = build(section, valid=6, test=6)
    made = documents(20)
    for name, own in (("train", made[:16]), ("valid", made[16:18]), ("test", made[18:])):
        tokens = {token for sample in served(getattr(data, name)) for token in sample}
        assert tokens - {0} <= set(np.concatenate(own).tolist())


def test_padding_is_not_learned(tmp_path):
    made = documents(6)  # of 5 to 14 tokens
    section = DataSection(data_path=write(tmp_path / "p", made), split="1,0,0", pack_impl="unpacked", num_workers=0)
    batches = list(build(section, train=6, micro_batch=1, seq_length=10).train.batches())
    found = {}
    for batch in batches:
        tokens, labels, mask = batch.tokens[0].tolist(), batch.labels[0].tolist(), batch.loss_mask[0].tolist()
        (own,) = [document.tolist()[:11] for document in made if document[0] == tokens[0]]
        counted = len(own) - 1
        assert tokens == (own + [0] * 11)[:10]
        assert labels == (own[1:] + [0] * 10)[:10]
        assert mask == [1.0] * counted + [0.0] * (10 - counted)
        found[tokens[0]] = True
    assert len(found) == 6


def test_documents_that_fit_share_a_sample(tmp_path):
    made = documents(20)
    section = DataSection(
        data_path=write(tmp_path / "p", made), split="1,0,0", pack_impl="pack_until_overflow", num_workers=0
    )
    data = build(section, train=1, seq_length=29, micro_batch=1)
    seen = []
    for batch in data.train.batches():
        row = [*batch.tokens[0].tolist(), batch.labels[0, -1].item()]
        while row and row[0] != 0:
            (own,) = [document.tolist() for document in made if document[0] == row[0]]
            assert row[: len(own)] == own
            seen.append(own[0])
            row = row[len(own) :]
        assert not any(row)
    assert sorted(seen) == [document[0] for document in made]
    assert len(data.train) < 20 / 2
    assert data.plan.train.passes == pytest.approx(1 / len(data.train))


def test_nothing_to_use(tmp_path):
    section = DataSection(
        data_path=write(tmp_path / "p", documents(4)), split="1,0,0", pack_impl="unpacked", allow_chopped=False
    )
    with pytest.raises(ConfigError, match=r"pack_impl = 'unpacked'.*longer than 4 tokens.*allow_chopped"):
        build(section, seq_length=3)


def test_names_of_retained_maps_report_packings_apart(tmp_path):
    path = write(tmp_path / "p", documents(10))
    for packing in ("packed", *PACKINGS):
        for chopped in (True, False):
            build(DataSection(data_path=path, pack_impl=packing, allow_chopped=chopped), seq_length=20)
    names = sorted(file.name.rpartition("_")[0] for file in tmp_path.glob("p_train_*_shuffle_idx.npy"))
    assert len(set(names)) == 6
    assert sum("_unpackedpi_ac_" in name for name in names) == 1
    assert sum("_pack_until_overflowpi_" in name for name in names) == 2


def epochs_of(section, epochs, **changes):
    settings = {"seq_length": 8, "seed": 3, "is_builder": True, "barrier": lambda: None} | changes
    return epoch_samples(section, epochs=epochs, **settings)


def test_epochs_of_packed_data(tmp_path):
    made = documents(20)
    section = DataSection(data_path=write(tmp_path / "p", made), split="1,0,0", num_workers=0)
    total = sum(map(len, made))
    assert epochs_of(section, 3) == (3 * total - 1) // 8
    data = build(section, train=(3 * total - 1) // 8, train_epochs=3, micro_batch=1)
    tokens = np.bincount([token for sample in served(data.train) for token in sample])
    # Three times each, but for what does not fill a last sample.
    assert tokens[1:].max() == 3
    assert 3 * total - tokens.sum() <= 8
    assert list(tmp_path.glob("p_train_indexmap_Nonens_8sl_3s_packedpi_ac_*"))


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_of_full_documents(tmp_path, packing):
    section = DataSection(
        data_path=write(tmp_path / "p", documents(20)), split="1,0,0", pack_impl=packing, num_workers=0
    )
    count = epochs_of(section, 2, seq_length=40)
    data = build(section, train=count, train_epochs=2, micro_batch=1, seq_length=40)
    tokens = np.bincount([token for sample in served(data.train) for token in sample])
    assert set(tokens[documents(20)[3]]) == {2}
    half = [token for sample in served(data.train)[: count // 2] for token in sample if token]
    assert packing != "unpacked" or len(half) == len(set(half))


def test_epochs_of_several_sets_use_each_up(tmp_path):
    sets = [write(tmp_path / "a", documents(10)), write(tmp_path / "b", documents(50, first=1000))]
    section = DataSection(train_data_paths=sets, pack_impl="unpacked", num_workers=0)
    count = epochs_of(section, 2, seq_length=20)
    assert 120 - 2 <= count <= 120
    data = build(section, train=count, train_epochs=2, micro_batch=1, seq_length=20)
    firsts = [sample[0] for sample in served(data.train)]
    assert len(firsts) == count
    # The small set is spread over the run in proportion.
    positions = [position for position, first in enumerate(firsts) if first < 1000]
    assert len(positions) >= 19
    assert max(np.diff(positions)) <= 8


def test_build_data_refuses_nothing_that_epochs_need(tmp_path):
    """build_data serves as many samples as epoch_samples promised."""
    section = DataSection(train_data_paths=[write(tmp_path / "a", documents(9))], num_workers=0)
    count = epochs_of(section, 5)
    data = build_data(
        section,
        eod=EOD,
        seq_length=8,
        seed=3,
        micro_batch=1,
        data_rank=0,
        data_size=1,
        train_samples=count,
        valid_samples=0,
        test_samples=0,
        is_builder=False,
        barrier=lambda: None,
        train_epochs=5,
    )
    assert len(data.train) == count == data.plan.train.samples
    assert data.plan.train.passes == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow"])
@pytest.mark.parametrize("chopped", [True, False])
def test_the_plan_reports_what_full_documents_leave_out(tmp_path, packing, chopped):
    """Documents of 5 to 14 tokens in samples of 11: by hand, those of 12 to 14 are too long."""
    made = documents(20)
    sizes = [len(document) for document in made]
    cut = sum(size > 11 for size in sizes) if chopped else 0
    out = 0 if chopped else sum(size > 11 for size in sizes)
    read = sum(min(size, 11) for size in sizes if chopped or size <= 11)
    section = DataSection(
        train_data_paths=[write(tmp_path / "p", made)], pack_impl=packing, allow_chopped=chopped, num_workers=0
    )
    plan = build(section, train=40, seq_length=10).plan
    (source,) = plan.train.sources
    assert source.unpacked == UnpackedSummary(20 - out, read, cut)
    reported = str(plan).splitlines()[1]
    assert f"a pass reads {20 - out} of the documents and {read} of the tokens" in reported
    assert ("documents are cut to 11 tokens" in reported) == chopped
    assert (f"{out} are left out" in reported) == (not chopped)


def test_the_plan_says_nothing_of_full_documents_where_all_is_read(tmp_path):
    for packing in PACKINGS:
        section = DataSection(data_path=write(tmp_path / packing, documents(20)), pack_impl=packing, num_workers=0)
        assert len(str(build(section, train=40, seq_length=40).plan).splitlines()) == 1


def test_the_plan_of_passes_reports_what_is_drawn(tmp_path):
    """Two sets that are used up together: the weights are their shares of the samples."""
    sets = [write(tmp_path / "a", documents(10)), write(tmp_path / "b", documents(50, first=1000))]
    section = DataSection(train_data_paths=sets, pack_impl="unpacked", num_workers=0)
    count = epochs_of(section, 2, seq_length=20)
    plan = build(section, train=count, train_epochs=2, seq_length=20).plan
    assert [source.weight for source in plan.train.sources] == pytest.approx([1 / 6, 5 / 6])
    assert "16.7% " in str(plan)


@pytest.mark.parametrize("packing", ["packed", *PACKINGS])
@pytest.mark.parametrize("marked", [True, False])
def test_padding_is_what_the_packing_added_and_nothing_else(tmp_path, packing, marked):
    """Documents hold the ids of padding and of the end of text too, and end with another one."""
    made = [np.array([7, 0, EOD] + [9] * (1 + number % 9)) for number in range(30)]
    section = DataSection(train_data_paths=[write(tmp_path / "p", made)], pack_impl=packing, num_workers=0)
    data = build(section, train=20, seq_length=11, mark_padding=marked)
    batches = list(data.train.batches())
    if packing == "packed" or not marked:
        assert all(batch.padding is None for batch in batches)
        return
    for batch in batches:
        for tokens, padding in zip(batch.tokens.tolist(), batch.padding.tolist(), strict=True):
            assert padding == [not any(tokens[at:]) for at in range(11)]
        assert batch.first(4).padding.tolist() == [row[:4] for row in batch.padding.tolist()]
        assert not batch.behind(2).padding[:, :2].any() and torch.equal(batch.behind(2).padding[:, 2:], batch.padding)
    assert any(bool(batch.padding.any()) for batch in batches)
