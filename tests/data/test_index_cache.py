"""The kept index maps: their names say everything that determines them, and they are whole or absent."""

import os
from dataclasses import replace

import numpy as np
import pytest

from megatron.data.dataset import index_check
from megatron.data.dataset.index_cache import IndexRequest, index_maps, read_index_map
from megatron.data.dataset.index_map import epochs_needed
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter


def dataset(prefix, sizes):
    with DatasetWriter(prefix, np.dtype("<u2")) as writer:
        for size in sizes:
            writer.add_document(np.arange(size))
    return IndexedDataset(prefix)


@pytest.fixture
def request_(tmp_path):
    data = dataset(tmp_path / "p", [5, 9, 12, 3])
    return IndexRequest(data, "train", range(3), seq_length=4, samples=10, epochs=epochs_needed(26, 4, 10), seed=7)


def test_a_retained_map_equals_a_computed_one(request_):
    made = request_.build()
    assert read_index_map(request_) is None
    (retained,), warnings = index_maps([request_], is_builder=True, barrier=lambda: None)
    assert warnings == []
    for array in ("documents", "samples", "shuffle"):
        np.testing.assert_array_equal(getattr(retained, array), getattr(made, array))
        assert getattr(retained, array).dtype == getattr(made, array).dtype
    assert retained.epochs == made.epochs


def test_names_carry_the_public_facts(request_):
    index_maps([request_], is_builder=True, barrier=lambda: None)
    names = sorted(path.name for path in request_.paths().values())
    assert all(name.startswith("p_train_indexmap_10ns_4sl_7s_packedpi_ac_") for name in names)
    assert [name.rsplit("_", 2)[1] for name in names] == ["doc", "sample", "shuffle"]
    assert {path.name for path in request_.paths()["shuffle"].parent.iterdir()} == {*names, "p.bin", "p.idx"}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "valid"},
        {"documents": range(1, 4)},
        {"documents": range(2)},
        {"seq_length": 5},
        {"samples": 11},
        {"epochs": 3},
        {"seed": 8},
    ],
)
def test_whatever_changes_the_map_changes_the_name(request_, change):
    other = replace(request_, **change)
    assert set(other.paths().values()).isdisjoint(request_.paths().values())


def test_other_data_under_the_same_prefix_is_not_served_from_the_cache(request_, tmp_path):
    index_maps([request_], is_builder=True, barrier=lambda: None)
    other = replace(request_, dataset=dataset(tmp_path / "p", [5, 9, 11, 3]))
    assert read_index_map(other) is None


def test_a_map_that_was_cut_short_is_made_again(request_):
    index_maps([request_], is_builder=True, barrier=lambda: None)
    path = request_.paths()["samples"]
    path.write_bytes(path.read_bytes()[:-4])
    assert read_index_map(request_) is None
    (again,), _ = index_maps([request_], is_builder=True, barrier=lambda: None)
    np.testing.assert_array_equal(again.samples, request_.build().samples)
    assert read_index_map(request_) is not None


DAMAGES = {
    "an empty file": lambda path: path.write_bytes(b""),
    "zeros at the end": lambda path: overwrite(path, lambda array: array[len(array) // 2 :].fill(0)),
    "zeros at the start": lambda path: overwrite(path, lambda array: array[: len(array) // 2].fill(0)),
    "beyond the end": lambda path: overwrite(path, lambda array: array[-1:].fill(10**6)),
    "another order": lambda path: overwrite(path, lambda array: array.put(range(array.size), array.flatten()[0])),
}


def overwrite(path, change):
    array = np.load(path)
    change(array)
    np.save(path, array)


@pytest.mark.parametrize("array", ["documents", "samples", "shuffle"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_map_is_made_again(damage, array, request_):
    index_maps([request_], is_builder=True, barrier=lambda: None)
    DAMAGES[damage](request_.paths()[array])
    assert read_index_map(request_) is None
    (again,), _ = index_maps([request_], is_builder=True, barrier=lambda: None)
    for name in ("documents", "samples", "shuffle"):
        np.testing.assert_array_equal(getattr(again, name), getattr(request_.build(), name))


def test_damage_of_a_long_map_is_found_in_blocks(request_, monkeypatch):
    for name, value in {"FULL_CHECK": 0, "BLOCKS": 2, "BLOCK": 3}.items():
        monkeypatch.setattr(index_check, name, value)
    index_maps([request_], is_builder=True, barrier=lambda: None)
    assert read_index_map(request_) is not None
    overwrite(request_.paths()["shuffle"], lambda array: array[:2].fill(0))
    assert read_index_map(request_) is None


@pytest.mark.parametrize("packing", ["packed", "unpacked", "pack_until_overflow"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_kind_of_map_is_read_back(packing, epochs, tmp_path):
    data = dataset(tmp_path / "p", [5, 0, 9, 12, 3, 1, 0, 30])
    request = IndexRequest(data, "train", range(8), 4, None, epochs, seed=3, packing=packing)
    index_maps([request], is_builder=True, barrier=lambda: None)
    assert read_index_map(request) is not None


def test_others_wait_for_the_builder(request_):
    calls = []

    def builder_at_work():
        calls.append("barrier")
        index_maps([request_], is_builder=True, barrier=lambda: None)

    (found,), _ = index_maps([request_], is_builder=False, barrier=builder_at_work)
    assert calls == ["barrier"]
    # Served from the builder's files, not computed again.
    assert not found.documents.flags.owndata


def test_where_nothing_can_be_written_every_rank_computes(request_, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    (found,), warnings = index_maps([request_], is_builder=True, barrier=lambda: None)
    np.testing.assert_array_equal(found.samples, request_.build().samples)
    assert len(warnings) == 1
    assert "Permission denied" in warnings[0]
    assert len(list(request_.paths()["samples"].parent.iterdir())) == 2
