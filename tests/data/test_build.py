"""From the data section to loaders, with real files."""

import os
import resource

import numpy as np
import pytest

from megatron.config.schema.data import DataSection
from megatron.data.dataset.builder import build_data
from megatron.data.dataset.index_map import build_index_map
from megatron.data.indexed.metadata import DatasetCard
from megatron.data.indexed.writer import DatasetWriter
from megatron.errors import ConfigError, RunError

EOD = 0


def write(prefix, documents, card=None):
    with DatasetWriter(prefix, np.dtype("<u2")) as writer:
        for document in documents:
            writer.add_document(document)
        writer.card = card
    return str(prefix)


def documents(count, first=1):
    """Documents of 5 to 14 tokens, every token another number."""
    made, token = [], first
    for number in range(count):
        size = 5 + number * 7 % 10
        made.append(np.arange(token, token + size))
        token += size
    return made


def build(section, *, train=20, valid=0, test=0, rank=0, ranks=1, **changes):
    settings = {
        "eod": EOD,
        "seq_length": 8,
        "seed": 3,
        "micro_batch": 2,
        "data_rank": rank,
        "data_size": ranks,
        "train_samples": train,
        "valid_samples": valid,
        "test_samples": test,
        "is_builder": True,
        "barrier": lambda: None,
    }
    return build_data(section, **(settings | changes))


@pytest.fixture
def one_set(tmp_path):
    return DataSection(data_path=write(tmp_path / "p", documents(20)), split="8,1,1", num_workers=0)


def served(loader, consumed=0):
    return [sample for batch in loader.batches(consumed) for sample in batch.tokens.tolist()]


def test_samples_are_the_row_of_documents(one_set):
    """Every sample, put together here from the documents themselves."""
    made = documents(20)
    data = build(one_set)
    sizes = np.array([len(document) for document in made])
    total = int(sizes[:16].sum())
    index = build_index_map(sizes, range(16), seq_length=8, epochs=-(-161 // total), seed=3)
    row = np.concatenate([made[document] for document in index.documents])
    expected = [row[start * 8 : start * 8 + 9].tolist() for start in index.shuffle.tolist()]
    batches = list(data.train.batches(0))
    assert [sample for batch in batches for sample in batch.tokens.tolist()] == [
        sample[:-1] for sample in expected[: len(expected) // 2 * 2]
    ]
    assert batches[0].labels.tolist() == [sample[1:] for sample in expected[:2]]


def test_no_split_reads_another(one_set):
    data = build(one_set, valid=4, test=4)
    made = documents(20)
    for name, own in (("train", made[:16]), ("valid", made[16:18]), ("test", made[18:])):
        tokens = {token for sample in served(getattr(data, name)) for token in sample}
        assert tokens <= set(np.concatenate(own).tolist())


def test_ranks_share_each_global_micro_batch(one_set):
    complete = served(build(one_set, micro_batch=4).train)
    ranks = [list(build(one_set, rank=rank, ranks=2).train.batches(0)) for rank in range(2)]
    together = [sample for step in zip(*ranks, strict=True) for batch in step for sample in batch.tokens.tolist()]
    assert together == complete


def test_resume_goes_on_where_it_was(one_set):
    complete = served(build(one_set).train)
    assert served(build(one_set).train, 6) == complete[6:]


def test_another_split_of_the_same_files_is_not_served_from_the_cache(one_set):
    first = served(build(one_set).train)
    other = served(build(DataSection(data_path=one_set.data_path, split="1,1,0", num_workers=0)).train)
    assert other != first
    assert max(token for sample in other for token in sample) <= max(documents(10)[-1])


def test_the_plan_says_what_comes(one_set):
    plan = build(one_set, valid=4).plan
    sizes = [len(document) for document in documents(20)]
    assert (plan.train.documents, plan.train.tokens) == (16, sum(sizes[:16]))
    assert (plan.valid.documents, plan.valid.tokens) == (2, sum(sizes[16:18]))
    assert plan.test is None
    assert plan.train.asked == 20 <= plan.train.samples
    (source,) = plan.train.sources
    assert source.epochs == -(-(20 * 8 + 1) // sum(sizes[:16]))
    assert plan.train.passes == pytest.approx(20 * 8 / sum(sizes[:16]))
    assert plan.train.bytes_per_token is None
    assert "16 documents" in str(plan)


def test_bytes_per_token_come_from_the_card(tmp_path):
    made = documents(20)
    total = sum(map(len, made))
    card = DatasetCard(20, total, 3 * total, "HFTokenizer", 1000, 0)
    path = write(tmp_path / "p", made, card)
    assert build(DataSection(data_path=path)).plan.train.bytes_per_token == pytest.approx(3.0)
    write(tmp_path / "q", made[:-1], card)
    assert build(DataSection(data_path=str(tmp_path / "q"))).plan.train.bytes_per_token is None


def test_path_lists_of_one(tmp_path):
    section = DataSection(
        train_data_paths=[write(tmp_path / "a", documents(10))],
        valid_data_paths=[write(tmp_path / "b", documents(10, first=1000))],
        num_workers=2,
    )
    data = build(section, valid=4, test=4)
    assert max(token for sample in served(data.train) for token in sample) < 1000
    assert min(token for sample in served(data.valid) for token in sample) >= 1000
    assert data.test is None
    assert data.plan.train.sources[0].path == str(tmp_path / "a")
    assert list(tmp_path.glob("a_train_0_indexmap_21ns_8sl_3s_*shuffle_idx.npy"))


def test_weights_part_the_samples(tmp_path):
    section = DataSection(
        train_data_paths=[write(tmp_path / "a", documents(10)), write(tmp_path / "b", documents(10, first=1000))],
        train_data_weights=[3, 1],
        num_workers=0,
    )
    data = build(section, train=100)
    from_b = sum(sample[0] >= 1000 for sample in served(data.train))
    assert from_b == 25
    assert [source.asked for source in data.plan.train.sources] == [75, 25]
    # Each set's map is built for half a percent more, rounded up, as the public order has it.
    assert list(tmp_path.glob("a_train_0_indexmap_76ns_8sl_3s_*shuffle_idx.npy"))
    assert list(tmp_path.glob("b_train_1_indexmap_26ns_8sl_3s_*shuffle_idx.npy"))
    assert [source.weight for source in data.plan.train.sources] == [0.75, 0.25]


def test_a_small_validation_share_is_reported(tmp_path):
    data = build(DataSection(data_path=write(tmp_path / "p", documents(10))), valid=4, test=4)
    assert data.valid is None
    assert data.test is None
    assert len(data.plan.warnings) == 2
    assert "for valid" in data.plan.warnings[0]
    # What a run prints of its data.
    assert [line for line in str(data.plan).splitlines() if line.startswith("warning: ")] == [
        f"warning: {warning}" for warning in data.plan.warnings
    ]
    assert "for test" in str(data.plan)


@pytest.mark.parametrize(
    ("section", "reported"),
    [
        ({}, "no data to train on"),
        ({"data_path": "missing"}, "cannot read"),
        ({"valid_data_paths": ["missing"]}, "no training data"),
        ({"train_data_paths": ["missing"]}, "cannot read"),
        ({"train_data_paths": ["a", "b"], "train_data_weights": [1.0]}, "2 paths and 1 weights"),
        ({"train_data_paths": ["a", "b"], "train_data_weights": [0.0, 0.0]}, "above 0"),
    ],
)
def test_issues_are_reported(section, reported):
    with pytest.raises(ConfigError, match=reported) as caught:
        build(DataSection(**section))
    assert all(issue.key for issue in caught.value.issues)


def test_a_set_is_named_once_in_a_split(tmp_path):
    """By one path or by two; with labels of its own it is another set, and splits may share one."""
    first, second = (write(tmp_path / name, documents(9)) for name in "ab")
    link = tmp_path / "link"
    for ending in (".bin", ".idx"):
        link.with_suffix(ending).symlink_to(f"{first}{ending}")
    relative = os.path.relpath(first)
    for other in (first, str(link), relative, f"{tmp_path}/../{tmp_path.name}/a"):
        for split in ("train", "valid"):
            paths = {"train_data_paths": [second], f"{split}_data_paths": [first, second, other]}
            with pytest.raises(ConfigError, match="are named twice") as caught:
                build(DataSection(**paths, num_workers=0), valid=4)
            (issue,) = caught.value.issues
            assert issue.key == f"{split}_data_paths" and issue.value == other
            assert f"{split}_data_weights" in str(caught.value)
    shared = DataSection(train_data_paths=[first, second], valid_data_paths=[str(link)], num_workers=0)
    assert build(shared, valid=4).valid is not None
    labelled = DataSection(train_data_paths=[first, first], train_label_data_paths=[None, second], num_workers=0)
    assert len(build(labelled).plan.train.sources) == 2


@pytest.mark.parametrize(("alpha", "shares"), [(1.0, [0.1, 0.9]), (0.0, [0.5, 0.5])])
def test_shares_by_documents_are_said(tmp_path, alpha, shares):
    sets = [write(tmp_path / "a", documents(10)), write(tmp_path / "b", documents(90, first=1000))]
    section = DataSection(
        train_data_paths=sets, weight_by_num_documents=True, weighted_sampler_alpha=alpha, num_workers=0
    )
    reported = str(build(section).plan)
    for path, share in zip(sets, shares, strict=True):
        assert f"{share:.1%} {path}," in reported


def test_no_training_documents(tmp_path):
    path = write(tmp_path / "p", documents(4))
    with pytest.raises(ConfigError, match="split = '0, 1, 0'"):
        build(DataSection(data_path=path, split="0, 1, 0"))


def test_damage_is_found_before_training(one_set, tmp_path):
    path = tmp_path / "p.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(RunError, match="damaged"):
        build(one_set)


def test_warming_up_reads_every_byte(one_set, tmp_path, monkeypatch):
    warmed = []
    monkeypatch.setattr("megatron.data.indexed.reader.IndexedDataset.warm_up", lambda self: warmed.append(self.prefix))
    build(one_set.model_copy(update={"mmap_warmup": True}), valid=2)
    assert warmed == [str(tmp_path / "p")]


def test_more_sets_than_a_byte_counts_and_than_a_process_may_open(tmp_path):
    """258 sets, each with one token of its own, and a limit of open files that they do not fit in."""
    paths = [write(tmp_path / f"p{number}", [np.full(30, number + 1)]) for number in range(258)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        data = build(DataSection(train_data_paths=paths, num_workers=0), train=774)
        assert [source.asked for source in data.plan.train.sources] == [3] * 258
        firsts = [sample[0] for sample in served(data.train)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.bincount(firsts, minlength=259)[1:].tolist() == [3] * 258


def test_a_issue_about_many_sets_is_reported_first(tmp_path):
    with pytest.raises(ConfigError) as caught:
        build(DataSection(train_data_paths=["some/path"] * 500, train_data_weights=[1.0]))
    assert str(caught.value).startswith("train_data_weights: 500 paths and 1 weights")
    assert len(str(caught.value)) < 200


def test_validation_sets_by_name(tmp_path):
    """Names of the files; two of one name stay apart. The blend is as it is without."""
    *folders, third = [tmp_path / name for name in ("one", "two", "three")]
    for folder in (*folders, third):
        folder.mkdir()
    valid = [
        write(folder / "books_text_document", documents(20, first=1000 * at)) for at, folder in enumerate(folders, 1)
    ]
    section = DataSection(
        train_data_paths=[write(tmp_path / "t", documents(20))],
        valid_data_paths=[
            *valid,
            write(tmp_path / "books_3", documents(20, first=3000)),
            write(tmp_path / "three" / "books", documents(20, first=4000)),
        ],
        num_workers=0,
    )
    plain = build(section, valid=12)
    data = build(section.model_copy(update={"valid_loss_per_set": True}), valid=12)
    assert plain.valid_sets == {}
    assert list(data.valid_sets) == ["books", "books_1", "books_3", "books_3_3"]
    assert served(data.valid) == served(plain.valid)
    for first, loader in zip((1000, 2000, 3000, 4000), data.valid_sets.values(), strict=True):
        rows = served(loader)
        assert len(rows) >= 12
        assert all(first <= token < first + 1000 for row in rows for token in row)
    assert [split.name for split in data.plan.splits()] == ["train", "valid"]


def test_the_same_validation_samples(tmp_path):
    paths = {name: [write(tmp_path / name, documents(20))] for name in ("t", "v")}
    section = DataSection(
        train_data_paths=paths["t"], valid_data_paths=paths["v"], num_workers=0, valid_same_samples=True
    )
    data = build(section, valid=12)
    assert served(data.valid, 4) == served(data.valid)
    assert served(data.train, 4) == served(data.train)[4:]
