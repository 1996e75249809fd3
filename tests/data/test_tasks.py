"""Task files: what each form's rows mean, what becomes of a row, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizer

from megatron.config.schema.task import TaskSection
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.tasks.builder import TaskData
from megatron.data.tasks.rows import UNLABELED, Row, RowForm, clean, task_files
from megatron.data.tasks.samples import RowEncoder, TaskLoader, TaskSamples
from megatron.errors import ConfigError, RunError
from megatron.tokenizer_info import ClassTokens
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.masking import class_tokens

MNLI = ("contradiction", "entailment", "neutral")
MNLI_HEADER = [f"c{number}" for number in range(10)]
RACE = {
    "id": "high1",
    "article": "One\ntwo .  Three.",
    "questions": ["It is _ .", "Why?"],
    "options": [["red", "blue", "green", "grey"], ["so", "no", "yes", "we"]],
    "answers": ["C", "A"],
}
# form, labels, choices, fields, text of the file, rows
FORMS: dict[str, tuple[str, tuple[str, ...], int, dict[str, Any], str, list[Row]]] = {
    "mnli": (
        "mnli",
        MNLI,
        0,
        {},
        "\t".join([*MNLI_HEADER, "l1", "gold"])
        + "\n"
        + "\t".join(["7", *"abcdefg", 'He "goes" . Now', "She stays", "neutral", "entailment"])
        + "\n",
        [Row("7", (('He "goes". Now', "She stays"),), 1)],
    ),
    "mnli test": (
        "mnli",
        MNLI,
        0,
        {},
        "\t".join(MNLI_HEADER) + "\n" + "\t".join(["8", *"abcdefg", "A", "B"]) + "\n",
        [Row("8", (("A", "B"),), UNLABELED)],
    ),
    "qqp": (
        "qqp",
        ("0", "1"),
        0,
        {},
        "id\tq1\tq2\tquestion1\tquestion2\tis_duplicate\n5\t1\t2\tHow?\tWhy?\t1\n",
        [Row("5", (("How?", "Why?"),), 1)],
    ),
    "qqp test": (
        "qqp",
        ("0", "1"),
        0,
        {},
        "id\tquestion1\tquestion2\n6\tA?\tB?\n",
        [Row("6", (("A?", "B?"),), UNLABELED)],
    ),
    "race": (
        "race",
        (),
        4,
        {},
        json.dumps(RACE) + "\n",
        [
            Row("high1:0", tuple((f"It is {word} .", "One two. Three.") for word in RACE["options"][0]), 2),
            Row("high1:1", tuple((f"Why? {word}", "One two. Three.") for word in RACE["options"][1]), 0),
        ],
    ),
    "jsonl": (
        "jsonl",
        ("no", "yes"),
        0,
        {"text": "body"},
        '{"body": "a  b", "label": "yes"}\n\n{"body": "c", "text_pair": "d", "id": 9}\n',
        [Row("0", (("a  b", None),), 1), Row("9", (("c", "d"),), UNLABELED)],
    ),
    "jsonl of true and false": (
        "jsonl",
        ("false", "true"),
        0,
        {},
        '{"text": "a", "label": true}\n',
        [Row("0", (("a", None),), 1)],
    ),
    "choices": (
        "jsonl",
        (),
        2,
        {},
        '{"text": "q", "choices": ["x", "y"], "label": 1}\n{"text": "q", "choices": ["x", "y"], "label": "A"}\n',
        [Row("0", (("q x", None), ("q y", None)), 1), Row("1", (("q x", None), ("q y", None)), 0)],
    ),
    "tsv": (
        "tsv",
        ("0", "1"),
        0,
        {"text": "sentence"},
        "sentence\tlabel\na good one\t1\n\nbad\t0\n",
        [Row("0", (("a good one", None),), 1), Row("1", (("bad", None),), 0)],
    ),
    "tsv without a header": (
        "tsv",
        ("0", "1"),
        0,
        {"text": 3, "label": 1},
        "gj04\t1\t\tOur friends.\ngj05\t0\t*\tFriends our.\n",
        [Row("0", (("Our friends.", None),), 1), Row("1", (("Friends our.", None),), 0)],
    ),
    "tsv with a header alone": (
        "tsv",
        ("0", "1"),
        0,
        {},
        "text\tlabel\nbad\t0\n",
        [Row("0", (("bad", None),), 0)],
    ),
    "tsv with choices and numbers": (
        "tsv",
        (),
        2,
        {"text": "q", "choices": ["a", "b"]},
        "q\ta\tb\tlabel\nwho\tI\tyou\t1\n",
        [Row("0", (("who I", None), ("who you", None)), 1)],
    ),
    "tsv with choices": (
        "tsv",
        (),
        2,
        {"text": "q", "choices": ["a", "b"]},
        "q\ta\tb\tlabel\nwho\tI\tyou\tB\n",
        [Row("0", (("who I", None), ("who you", None)), 1)],
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "label": (
        "jsonl",
        {},
        '{"text": "a", "label": "yes"}\n{"text": "a", "label": "maybe"}\n',
        "line 2 .*'maybe' is none of no",
    ),
    "field": ("jsonl", {}, '{"label": "yes"}\n', "line 1 .*no field 'text'"),
    "text": ("jsonl", {}, '{"text": 3, "label": "yes"}\n', "3 is no text"),
    "json": ("jsonl", {}, '{"text": \n', "line 1 is not JSON"),
    "object": ("jsonl", {}, '["a"]\n', "it is no object"),
    "column": ("tsv", {"text": "t", "label": "l"}, "x\ty\na\tyes\n", "line 2 .*no field 't'"),
    "short row": ("tsv", {"text": 1, "label": 2}, "a\tb\n", "line 1 is not a row"),
    "empty": ("jsonl", {}, "\n", "it has no rows"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_has_these_rows(tmp_path: Path, name: str) -> None:
    form, labels, choices, fields, text, rows = FORMS[name]
    (tmp_path / "x").write_text(text)
    assert RowForm(form, labels, choices, fields).read(tmp_path / "x") == rows


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    form, fields, text, what = REFUSED[name]
    (tmp_path / "x").write_text(text)
    with pytest.raises(RunError, match=what) as error:
        RowForm(form, ("no", "yes"), 0, fields).read(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


def test_questions_have_as_many_answers_as_asked_for(tmp_path: Path) -> None:
    for row, what in (
        ('"choices": ["x"], "label": 0', "it has 1 choices"),
        ('"choices": ["x", "y"], "label": 2', "none of the 2"),
    ):
        (tmp_path / "x").write_text(f'{{"text": "q", {row}}}\n')
        with pytest.raises(RunError, match=what):
            RowForm("jsonl", (), 2, {}).read(tmp_path / "x")


def test_text_is_cleaned() -> None:
    assert clean(" a \n b . c  . d.") == "a b. c. d."


def test_folders_stand_for_their_files(tmp_path: Path) -> None:
    (tmp_path / "race/high").mkdir(parents=True)
    for name in ("high/2.txt", "high/1.txt", "readme.md"):
        (tmp_path / "race" / name).write_text("{}")
    assert [path.name for path in task_files([str(tmp_path / "race")], "race", "task_train_data")] == ["1.txt", "2.txt"]
    for name in ("race/none", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="task_train_data"):
            task_files([str(tmp_path / name)], "tsv", "task_train_data")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(200)), "run", "##ning"]
    path.write_text("\n".join(words) + "\n")
    return str(path)


def test_samples_are_those_of_transformers(vocabulary: str) -> None:
    ours, theirs = make_tokenizer("BertWordPieceLowerCase", vocab_file=vocabulary), BertTokenizer(vocabulary)
    encoding = RowEncoder(ours, class_tokens(ours), 12, 1)
    pairs = [("w1 running", "w2 w3"), ("w1", None), ("w5 w6 w7 w8", "w9 w10 w11 w12 w13"), ("w1 " * 30, None)]
    samples = TaskSamples([Row("x", (pair,), 0) for pair in pairs], encoding)
    loader = TaskLoader(samples, BatchSampler(4, 4, 0, 1), encoding, types=True, again=True)
    (batch,) = loader.batches(0)
    expected = theirs(
        [first for first, _ in pairs[:3]],
        [second or "" for _, second in pairs[:3]],
        padding="max_length",
        max_length=12,
    )
    for row, (ids, types) in enumerate(zip(expected["input_ids"], expected["token_type_ids"], strict=True)):
        if pairs[row][1] is not None:  # transformers puts a separator behind an empty second text too
            assert batch.tokens[row].tolist() == ids
            assert batch.token_types is not None and batch.token_types[row].tolist() == types
    alone = theirs([pairs[1][0], pairs[3][0]], padding="max_length", max_length=12, truncation=True)
    assert batch.tokens[[1, 3]].tolist() == alone["input_ids"]
    starts = batch.document_starts
    assert starts is not None and starts[1].tolist() == [0] * 3 + [3] * 9


def test_an_epoch_reads_other_rows_in_another_order_and_a_validation_all_of_them(vocabulary: str) -> None:
    tokenizer = make_tokenizer("BertWordPieceLowerCase", vocab_file=vocabulary)
    encoding = RowEncoder(tokenizer, ClassTokens(2, 3, 0), 8, 1)
    rows = [Row(str(number), ((f"w{number}", None),), number % 2) for number in range(10)]
    train = TaskSamples(rows, encoding, samples=24, per_epoch=8, seed=5)
    epochs = [[train.row(epoch * 8 + index).name for index in range(8)] for epoch in range(3)]  # type: ignore[union-attr]
    assert all(len(set(epoch)) == 8 for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert len({frozenset(epoch) for epoch in epochs}) > 1
    read = []
    for rank in range(2):
        valid = TaskLoader(TaskSamples(rows, encoding), BatchSampler(12, 2, rank, 2), encoding, types=False, again=True)
        batches = list(valid.batches(400))
        assert len(batches) == valid.full_pass == 3 and batches[0].token_types is None
        read.append(
            [
                (int(row[1]), float(mask[0]))
                for batch in batches
                for row, mask in zip(batch.tokens, batch.loss_mask, strict=True)
            ]
        )
    counted = sorted(word for word, mask in read[0] + read[1] if mask)
    assert counted == sorted(tokenizer.encode(f"w{number}")[0] for number in range(10))
    assert sum(mask for _, mask in read[0] + read[1]) == 10


def test_training_files_are_labeled_and_fill_a_batch(tmp_path: Path, vocabulary: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "w1", "label": "a"}\n{"text": "w2"}\n')
    tokenizer = make_tokenizer("BertWordPieceLowerCase", vocab_file=vocabulary)
    section = TaskSection(task_format="jsonl", task_train_data=(str(tmp_path / "x.jsonl"),), task_labels=("a", "b"))
    encoding = RowEncoder(tokenizer, class_tokens(tokenizer), 8, 1)
    with pytest.raises(RunError, match="row 1 has no label"):
        TaskData(section, encoding).samples_per_epoch(1)
    (tmp_path / "x.jsonl").write_text('{"text": "w1", "label": "a"}\n' * 3)
    assert TaskData(section, encoding).samples_per_epoch(2) == 2
    with pytest.raises(ConfigError, match="3 rows"):
        TaskData(section, encoding).samples_per_epoch(4)
    facts = TaskData(section, encoding).order_facts(1)
    assert (
        facts
        == TaskData(section, encoding).order_facts(1)
        != TaskData(section, replace(encoding, seq_length=9)).order_facts(1)
    )


def test_a_vocabulary_without_separators_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lacks \[CLS\] or <s>"):
        class_tokens(make_tokenizer("CharLevelTokenizer"))


def test_a_folder_is_one_set_and_names_differ(tmp_path: Path, vocabulary: str) -> None:
    for name in ("dev/middle/1.txt", "dev/middle/2.txt", "dev/high/1.txt", "test/high/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(RACE))
    tokenizer = make_tokenizer("BertWordPieceLowerCase", vocab_file=vocabulary)
    folders = tuple(str(tmp_path / name) for name in ("dev/middle", "dev/high", "test/high"))
    section = TaskSection(task_format="race", task_valid_data=folders, task_choices=4)
    sets = TaskData(section, RowEncoder(tokenizer, class_tokens(tokenizer), 32, 4)).valid
    assert {name: len(rows) for name, rows in sets.items()} == {"middle": 4, "dev-high": 2, "test-high": 2}


@pytest.mark.parametrize("label", ['"AB"', '"BA"', "2", "-1", '"2"', "true", '"c"'])
def test_a_label_is_one_answer(label: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(f'{{"text": "q", "choices": ["x", "y"], "label": {label}}}\n')
    with pytest.raises(RunError, match=r"line 1 .* is none of"):
        RowForm("jsonl", (), 2, {}).read(tmp_path / "x")


@pytest.mark.parametrize("form", ["jsonl", "tsv"])
def test_files_that_are_no_text_are_named(form: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes('{"text": "\u00e9"}\ttext\n'.encode("latin-1"))
    with pytest.raises(RunError, match="not UTF-8"):
        RowForm(form, ("0", "1"), 0, {}).read(tmp_path / "x")


def test_long_cells_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("text\tlabel\n" + "a" * 200_000 + "\t1\n")
    (row,) = RowForm("tsv", ("0", "1"), 0, {}).read(tmp_path / "x")
    assert len(row.texts[0][0]) == 200_000


def test_pairs_of_roberta_have_two_separators() -> None:
    """As its tokenizer in transformers: <s> A </s></s> B </s>."""
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5}
    base = Tokenizer(models.WordLevel(words, "<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    expected = base.encode("a", "b").ids

    class Named:
        special_tokens: ClassVar[dict[str, int]] = {"<s>": 0, "<pad>": 1, "</s>": 2}
        full = None

        def encode(self, text: str) -> list[int]:
            return [words[word] for word in text.split()]

    tokens = class_tokens(cast(Any, Named()))
    assert tokens == ClassTokens(0, 2, 1, doubled=True)
    encoder = RowEncoder(cast(Any, Named()), tokens, 8, 1)
    (batch,) = TaskLoader(
        TaskSamples([Row("0", (("a", "b"),), 0)], encoder), BatchSampler(1, 1, 0, 1), encoder, types=False, again=True
    ).batches(0)
    assert batch.tokens[0].tolist() == [*expected, 1, 1] and len(expected) == 6
