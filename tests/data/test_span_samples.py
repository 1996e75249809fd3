"""Samples of span corruption, against a plain loop over lists that follows the public rule word for word.

tests/data/test_megatron_core.py compares samples with Megatron-Core's own, number by number.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from megatron.config.derived.encoder_decoder import usual_spans
from megatron.config.schema.data import DataSection
from megatron.data.dataset.gpt_dataset import SampleExtras
from megatron.data.dataset.span_builder import SpanData
from megatron.data.indexed.reader import IGNORE_INDEX
from megatron.errors import ConfigError
from megatron.tokenizer_info import MaskingTokens, SpanTokens
from megatron.tokenizers.bert import BertWordPieceLowerCase, span_special
from megatron.tokenizers.masking import span_tokens
from tests.data import test_masked_samples as masked

START, END, SENTINELS = 5, 6, tuple(range(280, 300))
WORDS = MaskingTokens(-1, -1, -1, masked.PAD, masked.VOCABULARY, masked.TOKENS.continues)
TOKENS = SpanTokens(WORDS, START, END, SENTINELS)


def spans(source=64, target=32, **changes):
    return SpanData(TOKENS, source, target, short_seq_prob=0.3, **changes)


def loader(prefix, made, count=150, **more):
    data = DataSection(data_path=prefix, split="1,0,0", num_workers=0)
    return masked.built(data, made, length=made.encoder_length + made.decoder_length, train=count, **more).train


def read(samples, number):
    length = samples.sample_length
    tokens, extras = (
        np.empty(length, np.int64),
        SampleExtras(labels=np.empty(length, np.int64), borders=np.zeros(length, bool), padding=np.zeros(length, bool)),
    )
    samples.read(number, tokens, extras)
    return tokens, extras


def plain_sample(text, target, random):
    """Encoder's and decoder's input and labels of one sample, with lists."""
    words = []
    for at, token in enumerate(text):
        if token >= masked.FIRST_PIECE and words:
            words[-1].append(at)
        else:
            words.append([at])
    limit = min(0.15 * target, max(1, round(len(text) * 0.15)))
    starts = list(range(len(words)))
    random.shuffle(starts)
    taken, found = set(), []
    for start in starts:
        if len(taken) >= limit:
            break
        count = min(random.geometric(0.2), 10)
        grams = [list(chain(*words[start : start + size])) for size in range(count, 0, -1)]
        fitting = [gram for gram in grams if len(taken) + len(gram) <= limit]
        if fitting and taken.isdisjoint(fitting[0]):
            taken.update(fitting[0])
            found.append(fitting[0])
    encoder, labels, at = [], [], 0
    for sentinel, span in zip(SENTINELS, sorted(found), strict=False):
        encoder += [*text[at : span[0]], sentinel]
        labels += [sentinel, *(text[one] for one in span)]
        at = span[-1] + 1
    return [*encoder, *text[at:]], [START, *labels], [*labels, END]


@pytest.mark.parametrize(("source", "target"), [(64, 32), (24, 12)])
def test_samples_follow_the_public_rule(tmp_path, source, target):
    made = masked.documents()
    samples = loader(masked.write(tmp_path / "d", made), spans(source, target)).samples
    flat = [sentence.tolist() for document in made for sentence in document]
    assert len(samples) >= 150
    for number in range(len(samples)):
        first, end, length = samples._rows[number].tolist()
        text = list(chain(*flat[first:end]))[:length]
        encoder, decoder, labels = plain_sample(text, length, np.random.RandomState(masked.SEED + number))
        tokens, extras = read(samples, number)
        assert tokens.tolist() == [
            *encoder, *[masked.PAD] * (source - len(encoder)), *decoder, *[masked.PAD] * (target - len(decoder))
        ]  # fmt: skip
        rest = target - len(labels)
        assert extras.labels.tolist() == [IGNORE_INDEX] * source + labels + [IGNORE_INDEX] * rest
        borders = {0, source, *([len(encoder)] if len(encoder) < source else [])}
        assert set(np.flatnonzero(extras.borders).tolist()) == borders
        assert int((~extras.padding).sum()) == len(encoder) + len(decoder)


def test_nothing_is_cut_and_sentinels_suffice(tmp_path):
    """With little room or few sentinels a sample has fewer spans; what both sides read together is the text."""
    made = [[one % SENTINELS[0] for one in document] for document in masked.documents(60, least=6)]  # no sentinel
    prefix = masked.write(tmp_path / "d", made)
    few = SpanTokens(WORDS, START, END, SENTINELS[:2])
    for made in (spans(64, 9), SpanData(few, 64, 32)):
        samples = loader(prefix, made).samples
        most = 0
        for number in range(len(samples)):
            tokens, extras = read(samples, number)
            encoder, decoder = (
                part[~hidden].tolist()
                for part, hidden in zip(np.split(tokens, [64]), np.split(extras.padding, [64]), strict=True)
            )
            labels = extras.labels[64:][extras.labels[64:] >= 0].tolist()
            assert labels == [*decoder[1:], END]
            assert decoder[0] == START
            restored, spans_of = list[int](), dict[int, list[int]]()
            for token in decoder[1:]:
                if token in made.tokens.sentinels:
                    spans_of[token] = []
                else:
                    spans_of[list(spans_of)[-1]].append(token)
            for token in encoder:
                restored += spans_of.get(token, [token])
            first, end, target = samples._rows[number].tolist()
            assert restored == samples._sentences(first, end)[:target].tolist()
            most = max(most, len(spans_of))
        assert 0 < most <= len(made.tokens.sentinels)


def test_the_text_of_the_encoder_ends_where_the_vocabulary_is_that_of_t5(tmp_path):
    prefix = masked.write(tmp_path / "d", masked.documents())
    of_t5 = SpanTokens(WORDS, masked.PAD, END, SENTINELS, source_end=END)
    plain, ended = (
        loader(prefix, made).samples for made in (spans(24, 12), SpanData(of_t5, 24, 12, short_seq_prob=0.3))
    )
    for number in range(len(plain)):
        (one, extras), (other, more) = read(plain, number), read(ended, number)
        filled = int((~extras.padding[:24]).sum())
        assert other[: filled + 1].tolist() == [*one[:filled], END]
        assert other[24] == masked.PAD
        assert other[25:].tolist() == one[25:].tolist()
        assert np.flatnonzero(more.padding[:24]).tolist() == list(range(filled + 1, 24))


def test_share_and_length_of_spans(tmp_path):
    """15 % of the tokens; as many spans and tokens of the decoder as the rule for lengths expects of words."""
    generator = np.random.default_rng(0)
    documents = [[generator.integers(7, masked.FIRST_PIECE, 520)] for _ in range(40)]
    sentinels = tuple(range(1000, 1100))
    made = SpanData(SpanTokens(WORDS, START, END, sentinels), 512, 128, short_seq_prob=0.0)
    samples = loader(masked.write(tmp_path / "d", documents), made, count=40).samples
    counts = []
    for number in range(40):
        tokens, extras = read(samples, number)
        decoder = tokens[512:][~extras.padding[512:]]
        counts.append((int(np.isin(decoder, sentinels).sum()), len(decoder)))
    many, length = usual_spans(0.15, 510, 10, 5.0)
    found = np.mean(counts, axis=0)
    assert many - 2 <= found[0] <= many + 2
    assert length - 4 <= found[1] <= length + 2
    assert all(one - own - 1 == 76 for own, one in counts)


def test_batches_of_two_ranks_are_those_of_one_and_any_batch_starts_anywhere(tmp_path):
    prefix = masked.write(tmp_path / "d", masked.documents())
    full = list(loader(prefix, spans(), 20, micro=4).batches())
    halves = [list(loader(prefix, spans(), 20, rank=rank, ranks=2).batches()) for rank in (0, 1)]
    later = list(loader(prefix, spans(), 20, micro=4).batches(8))
    for name in ("tokens", "labels", "loss_mask", "document_starts"):
        both = [torch.cat([getattr(a, name), getattr(b, name)]) for a, b in zip(*halves, strict=True)]
        assert all(map(torch.equal, both, [getattr(each, name) for each in full]))
        assert all(
            map(torch.equal, [getattr(each, name) for each in later], [getattr(each, name) for each in full[2:]])
        )
    first = full[0]
    assert (first.tokens.shape, first.labels.shape) == ((4, 96), (4, 32))
    assert (first.tokens[:, 64] == START).all()
    assert (first.document_starts[:, 64:] == 64).all()
    assert torch.equal(first.document_starts[:, :64] == 0, first.tokens[:, :64] != masked.PAD)


def test_a_vocabulary_without_enough_sentinels_is_refused(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]

    def tokens_of(*more, needed=3):
        (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in (*pieces, *more)))
        return span_tokens(BertWordPieceLowerCase(str(tmp_path / "vocab.txt")), needed)

    found = tokens_of(*span_special(4))
    assert found.source_end is None
    assert (found.start, found.end, found.sentinels) == (7, 8, (9, 10, 11, 12))
    assert [number for number, one in enumerate(found.words.continues) if one] == [6]
    with pytest.raises(ConfigError, match=r"lacks 3 sentinels, <extra_id_0> and on \(it has 2\)"):
        tokens_of(*span_special(2))
    with pytest.raises(ConfigError, match=r"lacks \[BOS\] or <s> or <pad>, \[EOS\] or </s>, 3 sentinels"):
        tokens_of()
