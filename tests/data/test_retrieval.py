"""Samples of sentences and blocks against a plain loop, and of questions and passages against the form's own words."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.config.schema.data import DataSection
from megatron.config.schema.retrieval import RetrievalSection
from megatron.config.schema.task import TaskSection
from megatron.data.dataset import numba_loops
from megatron.data.dataset.block_map import build_block_map
from megatron.data.dataset.builder import build_data
from megatron.data.indexed.sentences import SentenceDataset
from megatron.data.retrieval.block_builder import BlockData
from megatron.data.retrieval.question_builder import QuestionData
from megatron.data.tasks.samples import RowEncoder
from megatron.errors import ConfigError, RunError
from megatron.tokenizer_info import ClassTokens
from tests.data.test_masked_samples import CLS, PAD, SEED, SEP, VOCABULARY, documents, write

TOKENS = ClassTokens(CLS, SEP, PAD)
LENGTH = 32


def plain_blocks(bounds: Any, sizes: Any, targets: Any, least: int) -> list[tuple[int, int, int, int]]:
    """Blocks by the public rule, a sentence at a time."""
    found: list[tuple[int, int, int, int]] = []
    for document, (first, end) in enumerate(pairwise(bounds)):
        if end - first < max(least, 1) or max(sizes[first:end], default=0) > 512:
            continue
        taken: list[int] = []
        for sentence in range(first, end):
            taken.append(sentence)
            left = end - sentence - 1
            full = sum(sizes[one] for one in taken) >= targets[document]
            if left == 0 or (full and len(taken) >= least and left >= least):
                found.append((taken[0], sentence + 1, document, len(found)))
                taken = []
    return found


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder, generator = tmp_path_factory.mktemp("blocks"), np.random.default_rng(4)
    made = documents()
    made[3] = [generator.integers(5, VOCABULARY, 513), generator.integers(5, VOCABULARY, 4)]
    titles = [[generator.integers(5, VOCABULARY, generator.integers(1, 30))] for _ in made]
    return write(folder / "text", made), write(folder / "title", titles)


@pytest.mark.parametrize("least", [1, 2])
def test_blocks_are_those_of_the_public_rule(prefixes: tuple[str, str], least: int) -> None:
    data, titles = (SentenceDataset(prefix) for prefix in prefixes)
    bounds, sizes = data.bounds.tolist(), data.sentence_sizes.tolist()
    targets = (LENGTH - 3 - np.minimum(titles.sizes, LENGTH // 2)).tolist()
    expected = plain_blocks(bounds, sizes, targets, least)
    found = build_block_map(data.bounds, data.sentence_sizes, np.array(targets), least=least, seed=5, samples=200)
    assert found.epochs == -(-200 // len(expected)) and len(found) == found.epochs * len(expected)
    assert sorted(map(tuple, found.rows.tolist())) == sorted(expected * found.epochs)
    assert not np.array_equal(found.rows, np.tile(expected, (found.epochs, 1)))
    usable = np.array(expected)
    rows = np.empty((len(sizes), 4), np.int64)
    numbers = sorted({row[2] for row in expected})
    firsts, ends = (data.bounds[:-1][numbers], data.bounds[1:][numbers])
    count = numba_loops.block_rows(firsts, ends, data.sentence_sizes, np.array(targets)[numbers], least, rows)
    assert rows[:count, :2].tolist() == usable[:, :2].tolist()


def loaded(prefixes: tuple[str, str], *, titles: bool, prob: float = 0.3, rank: int = 0, ranks: int = 1) -> Any:
    block = BlockData(
        TOKENS, VOCABULARY, types=True, query_in_block_prob=prob, titles_path=prefixes[1] if titles else None
    )
    return build_data(
        DataSection(data_path=prefixes[0], split="1,0,0", pack_impl="unpacked", num_workers=0),
        eod=0,
        seq_length=LENGTH,
        seed=SEED,
        micro_batch=4,
        data_rank=rank,
        data_size=ranks,
        train_samples=240,
        valid_samples=0,
        test_samples=0,
        is_builder=True,
        barrier=lambda: None,
        masked=block,
    ).train


def joined(sentences: list[list[int]], without: int | None) -> list[int]:
    return [token for number, own in enumerate(sentences) for token in own if number != without]


@pytest.mark.parametrize("titles", [True, False])
def test_a_query_is_a_sentence_of_its_block(prefixes: tuple[str, str], titles: bool) -> None:
    loader = loaded(prefixes, titles=titles)
    data, named = (SentenceDataset(prefix) for prefix in prefixes)
    keeping, chosen, number = [], [], 0
    for batch in loader.batches():
        assert batch.labels[:, 0].tolist() == [0, 1, 2, 3, 1, 1, 1, 1]
        assert batch.loss_mask[:, 0].tolist() == [1.0] * 4 + [0.0] * 4 and float(batch.loss_mask.sum()) == 4
        for row in range(4):
            first, end, document, _ = loader.samples._rows[number].tolist()
            sentences = [data.tokens[start : start + size].tolist() for start, size in zip(
                data.sentence_starts[first:end] // data.dtype.itemsize, data.sentence_sizes[first:end], strict=True
            )]  # fmt: skip
            title = named.get(document)[: LENGTH // 2].tolist()
            begin = [CLS, *title, SEP] if titles else [CLS]

            def row_of(begin: list[int], text: list[int]) -> list[int]:
                row_ids = [*begin, *text, SEP]
                row_ids = row_ids if len(row_ids) <= LENGTH else [*row_ids[: LENGTH - 1], SEP]
                return row_ids + [PAD] * (LENGTH - len(row_ids))

            query, block = batch.tokens[row].tolist(), batch.tokens[4 + row].tolist()
            found = [
                (position, keeps)
                for position, sentence in enumerate(sentences)
                for keeps in ((True, False) if len(sentences) > 1 else (True,))
                if query == row_of([CLS], sentence)
                and block == row_of(begin, joined(sentences, None if keeps else position))
            ]
            assert found, number
            real = sum(token != PAD for token in query)
            assert batch.document_starts[row].tolist()[real:] == [real] * (LENGTH - real)
            if len(sentences) > 1 and len(found) == 1:
                keeping.append(found[0][1])
                chosen.append(found[0][0] / (len(sentences) - 1))
            number += 1
    assert 0.15 < np.mean(keeping) < 0.45 and 0.35 < np.mean(chosen) < 0.65


def test_ranks_share_samples_and_any_sample_can_be_the_first(prefixes: tuple[str, str]) -> None:
    alone = [batch.tokens for batch in loaded(prefixes, titles=True).batches()]
    shared = [[batch.tokens for batch in loaded(prefixes, titles=True, rank=r, ranks=2).batches()] for r in (0, 1)]
    for step in range(10):
        for rank in (0, 1):
            assert shared[rank][step].equal(alone[2 * step + rank])
    late = next(iter(loaded(prefixes, titles=True).batches(80)))
    assert late.tokens.equal(alone[20])


def test_titles_of_other_documents_and_documents_without_blocks_are_refused(
    prefixes: tuple[str, str], tmp_path: Path
) -> None:
    few = write(tmp_path / "few", [[[7, 8]], [[9]]])
    with pytest.raises(ConfigError, match=r"titles_data_path = .*it has 2 titles, and .* 30 documents"):
        loaded((prefixes[0], few), titles=True)
    with pytest.raises(ConfigError, match="each has fewer than 2 sentences"):
        loaded((few, few), titles=False)
    wrong = write(tmp_path / "wrong", [[[7, 8], [VOCABULARY]]])
    with pytest.raises(RunError, match=f"document 0 holds the id {VOCABULARY}"):
        next(iter(loaded((wrong, wrong), titles=False).batches()))


class Letters:
    """A tokenizer of one id a character."""

    vocab_size, eod = 200, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def question_data(folder: Path, rows: Any, **changes: Any) -> QuestionData:
    (folder / "q.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    files = (str(folder / "q.json"),)
    section = TaskSection(task_format="dpr", task_train_data=files, task_valid_data=files)
    return QuestionData(section, RowEncoder(Letters(), TOKENS, 24, 1), RetrievalSection(**changes), SEED)


def passage(text: str, title: str = "") -> dict[str, str]:
    return {"title": title, "text": text}


ROWS = [
    {"question": "who\u2019s?", "positive_ctxs": [passage("yes", "T"), passage("too")],
     "hard_negative_ctxs": [passage("h1"), passage("h2")], "negative_ctxs": [passage("n1")]},
    {"question": "what", "positive_ctxs": [passage("p")], "hard_negative_ctxs": [], "negative_ctxs": [passage("n2")]},
    {"question": "left out", "positive_ctxs": [], "negative_ctxs": []},
]  # fmt: skip


def texts(tokens: Any) -> list[str]:
    names = {CLS: "<", SEP: ">", PAD: ""}
    return ["".join(names.get(token, chr(token)) for token in row) for row in tokens.tolist()]


def test_questions_and_passages_become_rows(tmp_path: Path) -> None:
    data = question_data(tmp_path, ROWS, retrieval_valid_hard_negatives=1, retrieval_valid_other_negatives=1)
    assert data.lines()[0] == "train: 2 questions from q, 1 without a right passage are left out"
    sizes = {"seed": SEED, "batch": 2, "micro_batch": 2, "data_rank": 0, "data_size": 1, "workers": 0}
    built = data.build(**sizes, train_samples=20, types=True)
    assert built.train is not None and built.valid is not None
    hard = set()
    for batch in built.train.batches():
        found = texts(batch.tokens)
        first = found.index("<who's>")
        own = found[2 + 2 * first : 4 + 2 * first]
        assert own[0] == "<T>yes>" and own[1] in ("<h1>", "<h2>")
        assert found[2 + 2 * (1 - first) :][:2] == ["<p>", "<n2>"]  # another negative where a hard one lacks
        assert batch.labels[:, 0].tolist() == [0, 2, 1, 1, 1, 1]
        assert not batch.token_types.any()
        hard.add(own[1])
    assert hard == {"<h1>", "<h2>"}
    (batch,) = built.valid.batches()
    assert texts(batch.tokens) == ["<who's>", "<what>", "<T>yes>", "<h1>", "<n1>", "<p>", "<n2>", ""]
    assert batch.labels[:, 0].tolist() == [0, 3, 1, 1, 1, 1, 1, 0]
    again = question_data(tmp_path, "\n".join(map(json.dumps, ROWS))).build(**sizes, train_samples=20, types=False)
    assert all(a.tokens.equal(b.tokens) for a, b in zip(built.train.batches(), again.train.batches(), strict=True))


@pytest.mark.parametrize(
    ("rows", "reported"),
    [
        ([{"positive_ctxs": []}], "question 0: it has no 'question'"),
        ([{"question": "x"}], "question 0: it has no 'positive_ctxs'"),
        ([{"question": "x", "positive_ctxs": [{"title": "y"}]}], "its positive_ctxs has a passage without text"),
        ([{"question": "x", "positive_ctxs": {}}], "its positive_ctxs is no list"),
        (ROWS[2:], "it has no question with a right passage"),
        ("[{]", "it is not JSON in UTF-8"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, rows: Any, reported: str) -> None:
    with pytest.raises(RunError, match=re.escape(reported)):
        _ = question_data(tmp_path, rows).train
