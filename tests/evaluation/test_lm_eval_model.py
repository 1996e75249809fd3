"""Our model as lm-eval sees it: per-document scores against float64, offline, on tasks made of local files."""

import importlib
import json
import logging
import math
import os
import random
import socket

import numpy
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from megatron.errors import ConfigError, RunError
from megatron.evaluation import tasks as tasks_module
from megatron.evaluation.lm_eval_model import HarnessModel
from megatron.evaluation.tasks import Tasks, results_table
from megatron.inference.batch_generation import TextGenerator
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config

CHOICE = """
task: small_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
metadata:
  version: 3.0
"""
WRITING = """
task: small_writing
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["q"]
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
"""
ROLLING = """
task: small_rolling
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list:
  - metric: bits_per_byte
"""
QUESTIONS = ["What is it", "Who", "a much longer question than the others", "Why not?", "zz", "How far"]


@pytest.fixture(scope="module")
def engine():
    return SmallEngine(small_config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files over one local file of documents."""
    path = tmp_path_factory.mktemp("tasks")
    data = path / "documents.jsonl"
    random = numpy.random.default_rng(4)
    with data.open("w") as file:
        for number, question in enumerate(QUESTIONS):
            choices = ["".join(map(chr, random.integers(97, 123, random.integers(1, 9)))) for _ in range(3)]
            document = {"question": question, "choices": choices, "answer": number % 3, "long": question * 9}
            file.write(json.dumps(document) + "\n")
    for name, text in (("choice", CHOICE), ("writing", WRITING), ("rolling", ROLLING)):
        (path / f"{name}.yaml").write_text(text.format(data=data))
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    def refuse(self, address, *rest):
        raise AssertionError(f"evaluation wants the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def model(engine, batch_size=4):
    return HarnessModel(engine, CharLevelTokenizer(), max_length=SEQUENCE, batch_size=batch_size)


def log_likelihood(engine, context, continuation):
    """In float64, of one text alone."""
    text = [*context, *continuation]
    rows = engine.logits(torch.tensor([text[:-1]]))[0].detach().double().numpy()
    total = 0.0
    for at in range(len(context), len(text)):
        row = rows[at - 1]
        total += row[text[at]] - row.max() - math.log(numpy.exp(row - row.max()).sum())
    return total


def samples(results, name):
    return sorted(results["samples"][name], key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("batch_size", [1, 5])
def test_multiple_choice_scores_are_those_of_each_text_alone(engine, folder, batch_size):
    results = Tasks(["small_choice"], str(folder)).run(model(engine, batch_size), bootstrap_iters=0)
    found = samples(results, "small_choice")
    assert len(found) == len(QUESTIONS)
    encode = CharLevelTokenizer().encode
    right = 0
    for sample in found:
        document = sample["doc"]
        # The blank at the end of the context is scored with the continuation.
        expected = [
            log_likelihood(engine, encode(document["question"]), encode(" " + each)) for each in document["choices"]
        ]
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(expected, abs=1e-4)
        right += int(numpy.argmax(expected)) == document["answer"]
    assert results["results"]["small_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert results["versions"]["small_choice"] == 3.0


def test_generation_stops_at_until_and_at_the_token_limit(engine, folder):
    results = Tasks(["small_writing"], str(folder)).run(model(engine), bootstrap_iters=0)
    tokenizer = CharLevelTokenizer()
    for sample in samples(results, "small_writing"):
        text = tokenizer.encode(sample["doc"]["question"])
        made = []
        while len(made) < 6:
            made.append(int(engine.logits(torch.tensor([text + made]))[0, -1].argmax()))
            if made[-1] == tokenizer.eod:
                made.pop()
                break
        assert sample["resps"][0][0] == tokenizer.decode(made).split("q")[0]


def test_rolling_scores_every_token_once(engine, folder):
    results = Tasks(["small_rolling"], str(folder)).run(model(engine), bootstrap_iters=0)
    tokenizer = CharLevelTokenizer()
    nats = size = 0.0
    for sample in samples(results, "small_rolling"):
        tokens = tokenizer.encode(sample["doc"]["long"])
        before = [tokenizer.eod, *tokens]
        for start in range(0, len(tokens), SEQUENCE):
            end = min(start + SEQUENCE, len(tokens))
            first = max(0, end - SEQUENCE)
            nats -= log_likelihood(engine, before[first : start + 1], tokens[start:end])
        size += len(sample["doc"]["long"].encode())
    assert results["results"]["small_rolling"]["bits_per_byte,none"] == pytest.approx(
        nats / size / math.log(2), rel=1e-5
    )


def test_a_perplexity_that_no_number_holds_is_infinite(engine, folder):
    long = ROLLING.replace("bits_per_byte", "word_perplexity\n  - metric: bits_per_byte").replace("small", "long")
    (folder / "long.yaml").write_text(long.format(data=folder / "long.jsonl"))
    (folder / "long.jsonl").write_text(json.dumps({"long": "x" * 900}) + "\n" + json.dumps({"long": "y" * 800}) + "\n")
    results = Tasks(["long_rolling"], str(folder)).run(model(engine), bootstrap_iters=4)
    found = results["results"]["long_rolling"]
    assert found["word_perplexity,none"] == math.inf and 0 < found["bits_per_byte,none"] < 20
    assert "Infinity" in results_table(results)


def test_limit_fewshot_and_wildcards(engine, folder):
    tasks = Tasks(["small_[cw]*"], str(folder), fewshot=None)
    results = tasks.run(model(engine), 2, bootstrap_iters=0)
    assert set(results["results"]) == {"small_choice", "small_writing"}
    assert len(results["samples"]["small_choice"]) == 2
    table = results_table(results)
    assert "small_choice" in table and "|Value" in table.replace(" ", "")


def test_built_requests_are_retained_for_the_next_run(engine, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))

    def run():
        results = Tasks(["small_choice"], str(folder)).run(model(engine), bootstrap_iters=0, cache_requests=True)
        return [sample["resps"] for sample in samples(results, "small_choice")]

    first = run()
    (retained,) = tmp_path.iterdir()
    assert "small_choice" in retained.name
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.construct_requests", None)  # nothing is built any more
    assert run() == first


def test_every_run_gets_the_same_worked_examples(engine, folder):
    tasks = Tasks(["small_choice"], str(folder), fewshot=2)
    first, second = (
        [sample["arguments"] for sample in samples(tasks.run(model(engine), bootstrap_iters=0), "small_choice")]
        for _ in range(2)
    )
    assert first == second


SHUFFLING = """
import random

def shuffled(dataset):
    return dataset.map(lambda document: {**document, "choices": random.sample(document["choices"], 3)})
"""


def test_choices_that_a_task_shuffles_are_in_lm_evals_order(folder, tmp_path, monkeypatch):
    text = CHOICE.format(data=folder / "documents.jsonl") + "process_docs: !function shuffling.shuffled\n"
    (tmp_path / "choice.yaml").write_text(text)
    (tmp_path / "shuffling.py").write_text(SHUFFLING)

    def loaded(number, load):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache{number}")
        return [document["choices"] for document in load()["tasks"]["small_choice"].test_docs()]

    def theirs():
        random.seed(0)  # as lm_eval.simple_evaluate does
        return TaskManager(include_path=str(tmp_path), include_defaults=False).load(["small_choice"])

    before = random.getstate()
    ours = [loaded(number, lambda: Tasks(["small_choice"], str(tmp_path))._loaded) for number in range(2)]
    assert random.getstate() == before
    assert ours == [loaded(2, theirs)] * 2


def test_a_context_that_leaves_no_room_keeps_its_end(engine, monkeypatch):
    asked, continue_tokens = [], TextGenerator.continue_tokens

    def continues(self, prompts, *rest):
        asked.extend(prompts)
        return continue_tokens(self, prompts, *rest)

    monkeypatch.setattr(TextGenerator, "continue_tokens", continues)
    long = "x" * 100 + "the end of it"
    model(engine).generate_until([Instance("generate_until", {}, (long, {"until": [], "max_gen_toks": 5}), 0)])
    assert asked == [list(long.encode()[-(SEQUENCE - 5) :])]


def test_answers_longer_than_the_model_holds_are_reported_once(engine, caplog):
    """Half of the context stays with the question, and the user knows that answers are shorter than the task wants."""
    answerer = model(engine)
    with caplog.at_level(logging.WARNING):
        found = [
            answerer._settings({"max_gen_toks": length}).maximum_tokens for length in (4, SEQUENCE, SEQUENCE, 8192)
        ]
    assert found == [4, SEQUENCE // 2, SEQUENCE // 2, SEQUENCE // 2]
    reported = [record.getMessage() for record in caplog.records]
    assert len(reported) == 2 and f"up to {SEQUENCE} tokens" in reported[0] and "up to 8192 tokens" in reported[1]


def test_empty_contexts_and_white_space_contexts_start_a_document(engine):
    answerer = model(engine)
    assert answerer._pair("", "abc").context == (0,)
    assert answerer._pair("  ", "abc").continuation == tuple(b"  abc")
    assert answerer._pair("a ", "bc") == answerer._pair("a", " bc")


def test_a_task_that_asks_for_something_unknown_is_reported(engine):
    with pytest.raises(RunError, match="num_beams"):
        model(engine)._settings({"num_beams": 4})


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        ("num_beams: 4", "num_beams = 4"),
        ("num_beams: 1\n  penalty_alpha: 0.6", "penalty_alpha = 0.6"),
        ("until: [3]", "not texts"),
        ("repetition_penalty: [3]", "not a number"),
        ("do_sample: true", "temperature = None: do_sample needs a temperature above 0"),
        ("do_sample: true\n  temperature: 0.0", r"temperature = 0\.0: do_sample needs"),
    ],
)
def test_arguments_that_cannot_be_followed_are_reported_when_tasks_are_loaded(folder, tmp_path, arguments, reported):
    text = WRITING.format(data=folder / "documents.jsonl").replace('until: ["q"]', arguments)
    (tmp_path / "task.yaml").write_text(text.replace("  do_sample: false\n", ""))
    with pytest.raises(ConfigError, match=reported) as error:
        Tasks(["small_writing"], str(tmp_path))
    assert "small_writing" in error.value.issues[0].location


def test_arguments_that_change_nothing_pass(engine, folder, tmp_path):
    def answers(more):
        text = WRITING.format(data=folder / "documents.jsonl").replace("max_gen_toks: 6", more)
        (tmp_path / "task.yaml").write_text(text)
        results = Tasks(["small_writing"], str(tmp_path)).run(model(engine), bootstrap_iters=0)
        return [sample["resps"] for sample in samples(results, "small_writing")]

    plain = answers("max_gen_toks: 6")
    assert answers("max_completion_tokens: 6\n  num_beams: 1\n  early_stopping: false\n  top_p: 1.0") == plain
    assert answers("max_tokens: 6\n  repetition_penalty: 100.0") != plain  # it is followed


def test_a_model_without_numbers_gets_no_score(folder):
    broken = SmallEngine(small_config())
    with torch.no_grad():
        next(iter(broken.module.parameters()))[:] = math.nan
    for name in ("choice", "rolling", "writing"):
        with pytest.raises(RunError, match=r"no score|could not be continued"):
            Tasks([f"small_{name}"], str(folder)).run(model(broken), bootstrap_iters=0)


FAILING = {
    "a result": "def own(doc, results):\n    return {'acc': int('five')}\n",
    "a sum": "def own(doc, results):\n    return {'acc': doc['question']}\n",
}


@pytest.mark.parametrize("failing", FAILING)
def test_a_task_whose_metrics_fail_is_named(engine, folder, tmp_path, failing):
    (tmp_path / "own.py").write_text(FAILING[failing])
    text = CHOICE.format(data=folder / "documents.jsonl").replace("small_choice", "small_failing")
    (tmp_path / "failing.yaml").write_text(f"{text}process_results: !function own.own\n")
    (tmp_path / "choice.yaml").write_text((folder / "choice.yaml").read_text())
    with pytest.raises(RunError, match=r"the metrics of the task small_failing cannot be computed: (Value|Type)Error"):
        Tasks(["small_choice", "small_failing"], str(tmp_path)).run(model(engine))


def test_an_error_of_the_model_is_no_error_of_a_task(engine, folder, monkeypatch):
    def fails(*_, **__):
        raise ValueError("no forward pass")

    monkeypatch.setattr("megatron.evaluation.lm_eval_model.score", fails)
    with pytest.raises(ValueError, match="no forward pass"):
        Tasks(["small_choice"], str(folder)).run(model(engine))


def test_rows_that_pad_the_vocabulary_have_no_probability(engine):
    pair = ("Wh", "o?")
    for vocabulary in (300, 512):
        lm = HarnessModel(engine, CharLevelTokenizer(), max_length=SEQUENCE, batch_size=2, vocabulary=vocabulary)
        ((score, _),) = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
        rows = engine.logits(torch.tensor([list(b"Who")]))[0, 1:, :vocabulary].double().log_softmax(-1)
        assert score == pytest.approx(float(rows[0, ord("o")] + rows[1, ord("?")]), abs=1e-6)


def test_an_unknown_task_is_the_users_issue(folder, monkeypatch):
    own = tasks_module.TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(tasks_module, "TaskManager", lambda **_: own)  # lm-eval's own list takes seconds
    with pytest.raises(ConfigError, match="did you mean small_choice") as error:
        Tasks(["small_chioce", "small_writing"], str(folder))
    assert [issue.value for issue in error.value.issues] == ["small_chioce"]
    with pytest.raises(ConfigError, match="several names as several words"):
        Tasks(["small_choice,small_writing"], str(folder))


def test_a_missing_folder_is_the_users_issue(tmp_path):
    with pytest.raises(ConfigError, match="eval_include_path"):
        Tasks(["anything"], str(tmp_path / "nowhere"))


def test_missing_data_is_reported_with_the_way_to_fetch_it(tmp_path):
    (tmp_path / "task.yaml").write_text(CHOICE.format(data=tmp_path / "nowhere.jsonl"))
    with pytest.raises(RunError, match="HF_DATASETS_OFFLINE"):
        Tasks(["small_choice"], str(tmp_path))


def test_an_argument_that_the_harness_does_not_have_is_reported(engine, folder):
    with pytest.raises(ConfigError, match="no argument bootstraps"):
        Tasks(["small_choice"], str(folder)).run(model(engine), bootstraps=3)


@pytest.mark.parametrize("name", ["write_out", "verbosity"])
def test_an_argument_that_chooses_lines_of_a_log_which_is_not_shown_is_refused(engine, folder, name):
    with pytest.raises(ConfigError, match=f"{name} .* is not shown") as caught:
        Tasks(["small_choice"], str(folder)).run(model(engine), **{name: True})
    assert "log_samples" in str(caught.value)


def test_tasks_that_import_evaluate_get_the_package(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    with tasks_module._own_evaluate_out_of_the_way():
        spec = importlib.util.find_spec("evaluate")
    assert spec is not None and "site-packages" in str(spec.origin)
