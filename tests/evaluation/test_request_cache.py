"""Cached requests of lm-eval are built again where what they are built from changed."""

import json
import os
from functools import partial
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from megatron.evaluation.lm_eval_model import HarnessModel
from megatron.evaluation.request_cache import task_digest
from megatron.evaluation.tasks import Tasks
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config

QUESTIONS = ["What", "Who", "Whose", "Why", "How", "Where"]
CHANGES = {
    "the question": ("task.yaml", "{{question}} Answer:", "{{question}} A:"),
    "a function": ("task_functions.py", "return choices", "return choices[::-1]"),
    "generation": ("task.yaml", "max_gen_toks: 6", "max_gen_toks: 3"),
    "a document": ("documents.jsonl", "Who", "Who else"),
    "a worked example": ("documents.jsonl", '"answer": 2', '"answer": 1'),
}
CHANGING = """
task: changing
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
fewshot_split: train
num_fewshot: 1
output_type: {kind}
doc_to_text: "{{{{question}}}} Answer:"
doc_to_target: "{{{{answer}}}}"
{rest}
"""
CHOOSING = "doc_to_choice: !function task_functions.choices"
GENERATING = """generation_kwargs: {until: [q], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]"""


@pytest.mark.parametrize("change", CHANGES)
def test_cached_requests_are_built_again_where_their_task_changed(tmp_path, monkeypatch, change):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    data = tmp_path / "documents.jsonl"
    documents = [{"question": each, "choices": [*"abc"], "answer": at % 3} for at, each in enumerate(QUESTIONS)]
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    model = HarnessModel(SmallEngine(small_config()), CharLevelTokenizer(), max_length=SEQUENCE, batch_size=4)
    kind, rest = ("generate_until", GENERATING) if change == "generation" else ("multiple_choice", CHOOSING)
    (tmp_path / "task_functions.py").write_text(
        "def choices(document):\n    choices = document['choices']\n    return choices\n"
    )
    (tmp_path / "task.yaml").write_text(CHANGING.format(data=data, kind=kind, rest=rest))

    def asked(cached):
        results = Tasks(["changing"], str(tmp_path)).run(model, bootstrap_iters=0, cache_requests=cached)
        return [
            sample["arguments"]
            for sample in sorted(results["samples"]["changing"], key=lambda sample: sample["doc_id"])
        ]

    first = asked(True)
    assert asked(True) == first == asked(False)
    name, old, new = CHANGES[change]
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    assert asked(True) == asked(False) != first


def test_cached_requests_are_those_of_the_chosen_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    data = tmp_path / "documents.jsonl"
    documents = [{"question": each, "choices": [*"abc"], "answer": at % 3} for at, each in enumerate(QUESTIONS)]
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    (tmp_path / "task_functions.py").write_text("def choices(document):\n    return document['choices']\n")
    (tmp_path / "task.yaml").write_text(CHANGING.format(data=data, kind="multiple_choice", rest=CHOOSING))
    model = HarnessModel(SmallEngine(small_config()), CharLevelTokenizer(), max_length=SEQUENCE, batch_size=4)
    for chosen in ([1, 3], [5, 4], None, [2]):
        samples = None if chosen is None else {"changing": chosen}
        run = Tasks(["changing"], str(tmp_path)).run
        results = run(model, bootstrap_iters=0, cache_requests=True, samples=samples)
        found = {each["doc_id"]: each for each in results["samples"]["changing"]}
        assert sorted(found) == sorted(chosen or range(len(QUESTIONS)))
        for number, each in found.items():
            assert each["doc"]["question"] == QUESTIONS[number]
            assert all(context.endswith(f"{QUESTIONS[number]} Answer:") for context, _ in each["arguments"])


@pytest.mark.parametrize("other", [{(1, 3): "x"}, {1: {2, 3}}, {"f": partial(len, [1])}, {"f": str.lower}])
def test_anything_that_a_task_holds_is_part_of_its_digest(other):
    def digest(metadata):
        config = SimpleNamespace(to_dict=lambda keep_callable: {"metadata": metadata}, num_fewshot=0)
        return task_digest(SimpleNamespace(config=config, eval_docs=[]))

    assert digest(other) == digest(dict(other))
    assert digest(other) != digest({(1, 2): "x"})
