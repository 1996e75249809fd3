"""Labels, rewards, borders of documents and weights, through build_data with real files."""

import numpy as np
import pytest
import torch

from megatron.config.schema.data import DataSection
from megatron.data.dataset.batch import make_batch
from megatron.data.dataset.blend import document_weights
from megatron.data.indexed.writer import DatasetWriter
from megatron.errors import ConfigError
from tests.data.test_build import build, documents, served, write


def write_signed(prefix, rows):
    with DatasetWriter(prefix, np.dtype("<i4")) as writer:
        for row in rows:
            writer.add_document(np.asarray(row))
    return str(prefix)


def masked(made):
    """Labels of the second half of every document."""
    return [np.where(np.arange(len(row)) < len(row) // 2, -100, row) for row in made]


@pytest.fixture
def labelled(tmp_path):
    made = documents(20)
    tokens, labels = write(tmp_path / "t", made), write_signed(tmp_path / "l", masked(made))
    return DataSection(train_data_paths=[tokens], train_label_data_paths=[labels], num_workers=0)


@pytest.mark.parametrize("packing", ["packed", "unpacked", "pack_until_overflow"])
def test_masked_labels_do_not_count(labelled, packing):
    """Each label is the next token, and none of the masked ones counts."""
    learned = set(np.concatenate([row[row >= 0] for row in masked(documents(20))]).tolist())
    data = build(labelled.model_copy(update={"pack_impl": packing}), train=40)
    counted = 0
    for batch in data.train.batches():
        for tokens, labels, mask in zip(
            batch.tokens.tolist(), batch.labels.tolist(), batch.loss_mask.tolist(), strict=True
        ):
            following = tokens[1:]
            for position, (label, counts) in enumerate(zip(labels, mask, strict=True)):
                if position < len(following) and (following[position] != 0 or counts):
                    assert counts == (following[position] in learned)
                assert label == (following[position] if position < len(following) else label)
                counted += counts
    assert counted > 100


def test_a_set_without_labels_in_a_blend_learns_every_token(tmp_path):
    first, second = documents(10), documents(10, first=1000)
    section = DataSection(
        train_data_paths=[write(tmp_path / "a", first), write(tmp_path / "b", second)],
        train_label_data_paths=[write_signed(tmp_path / "l", masked(first)), None],
        num_workers=0,
    )
    batches = list(build(section, train=40, micro_batch=1).train.batches())
    shares = {one: [] for one in (True, False)}
    for batch in batches:
        shares[batch.tokens[0, 0].item() >= 1000].append(batch.loss_mask.mean().item())
    assert set(shares[True]) == {1.0}
    assert np.mean(shares[False]) < 0.7


def test_rewards_are_those_of_the_document(tmp_path):
    made = documents(20)
    rewards = [[number - 7] for number in range(20)]
    section = DataSection(
        train_data_paths=[write(tmp_path / "t", made)],
        train_reward_data_paths=[write_signed(tmp_path / "r", rewards)],
        num_workers=0,
    )
    owner = {token: number for number, row in enumerate(made) for token in row.tolist()}
    for packing in ("packed", "unpacked"):
        for batch in build(section.model_copy(update={"pack_impl": packing})).train.batches():
            assert batch.rewards.dtype == torch.float32
            for tokens, own in zip(batch.tokens.tolist(), batch.rewards.tolist(), strict=True):
                assert own == [owner[token] - 7 if token else 0 for token in tokens]


def test_labels_of_other_documents_are_refused(labelled, tmp_path):
    other = write_signed(tmp_path / "o", masked(documents(20))[::-1])
    with pytest.raises(ConfigError, match=r"train_label_data_paths.*other lengths"):
        build(labelled.model_copy(update={"train_label_data_paths": (other,)}))
    short = write_signed(tmp_path / "s", [[1]] * 19)
    with pytest.raises(ConfigError, match=r"train_reward_data_paths.*a number for each of the 20 documents"):
        build(labelled.model_copy(update={"train_reward_data_paths": (short,)}))
    with pytest.raises(ConfigError, match=r"train_label_data_paths.*2 paths beside 1"):
        build(labelled.model_copy(update={"train_label_data_paths": (other, other)}))
    with pytest.raises(ConfigError, match="this is no path"):
        build(labelled.model_copy(update={"train_label_data_paths": (7,)}))


@pytest.mark.parametrize("packing", ["packed", "unpacked", "pack_until_overflow"])
@pytest.mark.parametrize("key", ["reset_attention_mask", "reset_position_ids"])
def test_documents_start_where_their_tokens_do(tmp_path, packing, key):
    made = documents(20)
    owner = {token: number for number, row in enumerate(made) for token in row.tolist()} | {0: -1}
    firsts = {row[0] for row in made} | {0}
    section = DataSection(data_path=write(tmp_path / "p", made), split="1,0,0", pack_impl=packing, num_workers=0)
    assert next(build(section).train.batches()).document_starts is None
    for batch in build(section.model_copy(update={key: True}), seq_length=20).train.batches():
        for tokens, starts in zip(batch.tokens.tolist(), batch.document_starts.tolist(), strict=True):
            owners = [owner[token] for token in tokens]
            for position, start in enumerate(starts):
                assert set(owners[start : position + 1]) == {owners[position]}
                # Each token of padding counts as a document of its own.
                assert start == 0 or tokens[start] in firsts


def test_an_end_inside_a_document_starts_another():
    samples = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [1, 1, 1, 1, 1, 1, 1]])
    borders = torch.zeros_like(samples, dtype=torch.bool)
    borders[1, 4] = True
    batch = make_batch(samples, eod=0, eod_mask_loss=False, borders=borders)
    assert batch.document_starts.tolist() == [[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 4, 4]]


def test_an_end_inside_a_conversation_starts_none():
    """Its turns may end with the same token; the data has the borders."""
    samples = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [1, 1, 1, 1, 1, 1, 1]])
    borders = torch.zeros_like(samples, dtype=torch.bool)
    borders[0, 3] = borders[1, 4] = True
    batch = make_batch(samples, eod=0, eod_mask_loss=False, labels=samples, borders=borders)
    assert batch.document_starts.tolist() == [[0, 0, 0, 3, 3, 3], [0, 0, 0, 0, 4, 4]]


@pytest.mark.parametrize("apart", [True, False])
def test_the_end_of_a_turn_is_no_end_of_a_document(apart):
    """With labels only the label behind a document's end does not count, and those that the data leaves out."""
    samples = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [1, 1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [1, 1, -100, 1, 1, 1, 1]])
    borders = torch.zeros_like(samples, dtype=torch.bool)
    borders[0, 5] = borders[1, 4] = True
    batch = make_batch(samples, eod=0, eod_mask_loss=True, labels=labels, borders=borders, apart=apart)
    assert batch.loss_mask.tolist() == [[1, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 1]]
    assert (batch.document_starts is not None) == apart
    with pytest.raises(ValueError, match="borders"):
        make_batch(samples, eod=0, eod_mask_loss=True, labels=labels)


@pytest.mark.parametrize(
    ("alpha", "weights"),
    [(1.0, [0.1, 0.1, 0.8]), (0.0, [1 / 3] * 3), (0.5, [10 / 48.2842712, 10 / 48.2842712, 28.2842712 / 48.2842712])],
)
def test_weights_by_documents(alpha, weights):
    assert document_weights([100, 100, 800], alpha) == pytest.approx(weights)


def test_documents_decide_the_share(tmp_path):
    """In place of given weights, as the public project has it."""
    section = DataSection(
        train_data_paths=[write(tmp_path / "a", documents(10)), write(tmp_path / "b", documents(40, first=1000))],
        train_data_weights=[1, 1],
        weight_by_num_documents=True,
        num_workers=0,
    )
    from_a = sum(sample[0] < 1000 for sample in served(build(section, train=100).train))
    assert from_a == 20
    half = section.model_copy(update={"weighted_sampler_alpha": 0.5})
    assert build(half, train=99).plan.train.sources[0].weight == pytest.approx(1 / 3)


def test_a_blend_goes_on_where_it_was(tmp_path):
    sets = [write(tmp_path / name, documents(30, first=first)) for name, first in (("a", 1), ("b", 1000), ("c", 2000))]
    section = DataSection(train_data_paths=sets, train_data_weights=[5, 3, 1], num_workers=0)
    full = served(build(section, train=120).train)
    for consumed in (2, 50, 118, 120):
        assert served(build(section, train=120).train, consumed) == full[consumed:]


def test_starting_late_reads_nothing_before(tmp_path, monkeypatch):
    """Resuming costs the same at any sample: only the samples that are served are read."""
    sets = [write(tmp_path / name, documents(30, first=first)) for name, first in (("a", 1), ("b", 1000))]
    data = build(DataSection(train_data_paths=sets, num_workers=0), train=100_000)
    calls = []
    original = type(data.train.samples).read
    monkeypatch.setattr(
        type(data.train.samples),
        "read",
        lambda self, number, *rest: (calls.append(number), original(self, number, *rest)),
    )
    next(data.train.batches(99_990))
    assert calls == [99_990, 99_991]
