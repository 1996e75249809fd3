"""The cloze task: the right line is right, and nothing but the text gives it away."""

import random

import pytest
import yaml

from megatron.data.corpora.cloze import cloze_items, cloze_task


@pytest.fixture(scope="module")
def documents():
    chance = random.Random(0)
    words = ["value", "index", "number", "result", "string", "buffer", "length", "offset"]
    made = []
    for document in range(12):
        lines = []
        for number in range(60):
            phrase = " ".join(chance.choice(words) for _ in range(5))
            lines.append("    " * (number % 3) + f"{phrase} {document} {number}")
            if number % 7 == 0:
                lines.append("")
        made.append("\n".join(lines))
    return made


@pytest.fixture(scope="module")
def items(documents):
    return cloze_items(documents, items=50)


def test_the_right_choice_goes_on_with_the_document(documents, items):
    assert len(items) == 50
    for item in items:
        full = item["context"] + item["choices"][item["label"]]
        assert any(full in document for document in documents)


def test_wrong_choices_do_not_occur_there_but_elsewhere(documents, items):
    for item in items:
        for number, choice in enumerate(item["choices"]):
            if number != item["label"]:
                assert not any(item["context"] + choice in document for document in documents)
                assert any(choice.strip() in document for document in documents)


def test_layout_and_length_do_not_report(items):
    for item in items:
        assert len(set(item["choices"])) == 4
        gaps = {choice[: len(choice) - len(choice.lstrip())] for choice in item["choices"]}
        assert len(gaps) == 1
        lengths = [len(choice.strip()) for choice in item["choices"]]
        assert max(lengths) <= 1.2 * lengths[item["label"]]
        assert min(lengths) >= 0.8 * lengths[item["label"]]
        assert item["context"] == item["context"].rstrip()


def test_lines_that_occur_twice_are_not_asked_for(documents):
    twice = "the same line stands in two places"
    made = cloze_items([f"{document}\n{twice}" for document in documents], items=1000)
    assert made
    assert not any(choice.strip() == twice for item in made for choice in item["choices"])


def test_labels_are_spread(items):
    labels = [item["label"] for item in items]
    assert all(labels.count(label) >= 4 for label in range(4))


def test_the_same_text_gives_the_same_items(documents, items):
    assert cloze_items(documents, items=50) == items
    assert cloze_items(documents, items=50, seed=1) != items


def test_too_little_text_gives_fewer_items():
    assert cloze_items(["one line only"]) == []


def test_the_task_names_the_file(tmp_path):
    path = tmp_path / 'odd "name".jsonl'
    task = yaml.safe_load(cloze_task("some_cloze", path))
    assert task["dataset_kwargs"]["data_files"]["test"] == str(path)
    assert (task["task"], task["output_type"], task["doc_to_target"]) == ("some_cloze", "multiple_choice", "label")
