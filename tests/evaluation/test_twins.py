"""Scores and answers are those of lm-eval's own `hf` model on the same weights, for tokenizers of several kinds."""

import json

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from megatron.distributed.mesh import Topology
from megatron.errors import RunError
from megatron.evaluation import runner
from megatron.evaluation.perplexity import cloze_pairs
from megatron.evaluation.tasks import Tasks
from megatron.inference.sampling import Sampling
from tests.evaluation.twins import LENGTH, twins
from tests.inference.small_model import small_config
from tests.tokenizers import made

PAIRS = [
    ("Hello world, this is", " a small test"),
    ("the quick brown fox ", "jumps over"),
    ("def read(self, n):\n    return", " self.data[:n]\n"),
    ("", "Hello world"),
    ("names and", " é 東京"),
    ("long " * 60, " context that is cut"),
    ("<s>already begun", " with a token"),
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello"),
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "Hello</s>"),
]
ROLLING = ["Hello world, this is a small test. " * 12, "x", "a line\n"]
TURNS = [
    [{"role": "user", "content": "Is this a small test?"}],
    [
        {"role": "user", "content": "the quick brown fox"},
        {"role": "assistant", "content": " jumps over it. "},
        {"role": "user", "content": "and the rain?"},
    ],
]
KINDS = {
    "llama2": ("PretrainedFromHF", made.llama2, ""),
    "llama3": ("PretrainedFromHF", made.llama3, ""),
    "no begin token": ("PretrainedFromHF", lambda folder: made.llama3(folder, begins=False), ""),
    "chatml": ("PretrainedFromHF", made.chatml, ""),
    "gpt2": ("PretrainedFromHF", made.gpt2, ""),
    "sentencepiece": (
        "SPMTokenizer",
        lambda folder: made.sentence_piece(folder, add_bos_token=True),
        "tokenizer.model",
    ),
}
CHATS = ("llama2", "llama3", "no begin token", "chatml")


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    kind, build, file = KINDS[request.param]
    return twins(build(tmp_path_factory.mktemp("twins")), kind, file)


def asked(kind, arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def scores(lm, pairs):
    return lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)


def same(ours, theirs):
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("both", KINDS, indirect=True)
def test_log_likelihoods_are_those_of_lm_evals_own_model(both):
    # lm-eval 0.4.13 ends with an error where an answer has no token of its own; see below.
    pairs = [pair for pair in PAIRS if not pair[0] or both.lm._encode_pair(*pair)[1]]
    assert len(pairs) >= len(PAIRS) - 1
    same(scores(both.model(), pairs), scores(both.lm, pairs))
    requests = asked("loglikelihood_rolling", [(text,) for text in ROLLING])
    ours = both.model().loglikelihood_rolling(requests)
    assert ours == pytest.approx(both.lm.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-4)


@pytest.mark.parametrize("both", KINDS, indirect=True)
def test_a_cloze_word_has_the_tokens_that_lm_eval_scores(both):
    texts = ["Hello world, this is a test", "the quick brown fox", "names and é", "He said: 'no'\nand left."]
    theirs = [both.lm._encode_pair(text[: text.rindex(" ")], text[text.rindex(" ") :])[1] for text in texts]
    assert sum(map(bool, theirs)) >= 3  # none where the word joins the one before it in a single token
    for pair, expected in zip(cloze_pairs(texts, both.tokenizer), theirs, strict=True):
        assert pair.continuation == tuple(expected or pair.continuation) != ()


@pytest.mark.parametrize("both", CHATS, indirect=True)
def test_conversations_are_scored_as_lm_evals_own_model_scores_them(both):
    model = both.model(chat=both.chat())
    texts = [model.apply_chat_template(turns) for turns in TURNS]
    assert texts == [both.lm.apply_chat_template(turns) for turns in TURNS]
    begun = [*TURNS[1], {"role": "assistant", "content": "the answer is "}]
    assert model.apply_chat_template(begun, False) == both.lm.apply_chat_template(begun, False)
    pairs = [(text, answer) for text in texts for answer in ("yes", " no", "the rain fell")]
    same(scores(model, pairs), scores(both.lm, pairs))


# sentencepiece and the decoder that transformers has for its models part bytes that are no text in different ways.
@pytest.mark.parametrize("both", [kind for kind in KINDS if kind != "sentencepiece"], indirect=True)
def test_answers_are_those_of_lm_evals_own_model(both):
    how = {"until": ["\n\n", "</s>", "q"], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", [(context, dict(how)) for context, _ in PAIRS if context])
    both.lm.batch_size_per_gpu = 1  # padding on the left moves what equally likely tokens give
    assert both.model().generate_until(requests) == both.lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("both", ["llama3"], indirect=True)
def test_a_repetition_penalty_of_the_model_holds_where_a_task_has_none(both, monkeypatch):
    how = {"until": ["\n\n"], "max_gen_toks": 16}
    context = "the quick brown fox"
    penalties = ({}, {"repetition_penalty": 1.0}, {"repetition_penalty": 3.0})
    requests = asked("generate_until", [(context, {**how, **penalty}) for penalty in penalties])
    both.lm.batch_size_per_gpu = 1
    plain = both.lm.generate_until(requests, disable_tqdm=True)
    monkeypatch.setattr(both.theirs.generation_config, "repetition_penalty", 1.5)
    theirs = both.lm.generate_until(requests, disable_tqdm=True)
    assert theirs[0] != plain[0] and theirs[1:] == plain[1:]
    assert both.model(sampling=Sampling(repetition_penalty=1.5)).generate_until(requests) == theirs
    assert both.model().generate_until(requests) == plain


@pytest.mark.parametrize("both", ["llama3"], indirect=True)
@pytest.mark.parametrize(
    ("own", "task", "limit"),
    [
        ({}, {}, 50),
        ({}, {"top_k": 7}, 7),
        ({}, {"top_k": 0}, None),
        ({}, {"top_p": 0.0}, 1),
        ({"temperature": 0.5, "top_k": 9}, {"top_p": 0.0}, 1),
        ({"temperature": 0.5, "top_k": 3}, {}, 3),
        ({"temperature": 0.5, "top_k": 3}, {"top_k": 9}, 9),
        ({"temperature": 0.5}, {}, None),
    ],
)
def test_tasks_sample_from_as_many_tokens_as_transformers_does(both, monkeypatch, own, task, limit):
    # At this temperature every token that may be chosen is as likely as any other.
    how = {"until": ["\n\n"], "max_gen_toks": 1, "do_sample": True, "temperature": 1e4, **task}
    requests = asked("generate_until", [("the quick brown", dict(how))] * 400)
    ids = torch.tensor([both.tokenizer.encode_with_special_tokens("the quick brown")])
    prefix = torch.tensor([both.tokenizer.prefix_ids], dtype=torch.long)
    with torch.no_grad():
        logits = both.theirs(torch.cat([prefix, ids], 1)).logits[0, -1, : both.tokenizer.vocab_size]
    texts = {both.tokenizer.decode([token]) for token in logits.argsort().flip(0)[:limit].tolist()}
    for name, value in ({"top_k": 0} | own if own else {}).items():  # said in generation_config.json, 0 is no limit
        monkeypatch.setattr(both.theirs.generation_config, name, value)
    both.lm.batch_size_per_gpu = 400
    torch.manual_seed(0)
    theirs = set(both.lm.generate_until(requests, disable_tqdm=True))
    ours = set(both.model(sampling=Sampling(**own)).generate_until(requests))
    for answers in (theirs, ours):
        assert answers <= texts and len(answers) > len(texts) / 2


@pytest.mark.parametrize("both", ["llama2"], indirect=True)
def test_an_answer_that_joins_the_context_is_scored_as_tokens_of_its_own(both):
    # One token holds the end of the context and the whole answer.
    (pair,) = [pair for pair in PAIRS if pair[0] and not both.lm._encode_pair(*pair)[1]]
    context, answer = pair
    words = both.lm.tokenizer
    before = words(context).input_ids
    own = words(answer, add_special_tokens=False).input_ids
    logits = both.theirs(torch.tensor([before + own])).logits[0].detach().double().log_softmax(-1)
    expected = sum(float(logits[len(before) - 1 + at, token]) for at, token in enumerate(own))
    assert scores(both.model(), [pair])[0] == (pytest.approx(expected, abs=1e-4), False)


@pytest.mark.parametrize("both", ["chatml"], indirect=True)
def test_an_answer_without_text_is_refused(both):
    for context in ("Hello", ""):
        with pytest.raises(RunError, match="answer without text"):
            scores(both.model(), [(context, "")])


@pytest.mark.parametrize("both", ["chatml"], indirect=True)
def test_contexts_that_are_cut_are_counted(both, caplog):
    caplog.set_level("INFO")
    scores(both.model(), PAIRS)
    how = {"until": [], "max_gen_toks": 90}
    both.model().generate_until(asked("generate_until", [("Hello", how), ("long " * 60, how)]))
    reported = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    assert reported == [
        f"1 of {len(PAIRS)} contexts do not fit the model's context of {LENGTH} tokens and are cut on their left",
        f"1 of 2 contexts do not fit the model's context of {LENGTH} tokens and are cut on their left",
    ]


EXAMPLES = """
task: examples
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
"""


@pytest.mark.parametrize("both", ["llama3"], indirect=True)
def test_worked_examples_are_turns_of_a_conversation_as_with_lm_eval(both, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": each}) + "\n" for each in ("a?", "rain?", "fox?")))
    (tmp_path / "examples.yaml").write_text(EXAMPLES.format(data=data))
    config = small_config(eval_tasks=["examples"], eval_chat_template=True, eval_num_fewshot=1)
    ours = runner._run_tasks(
        config, Tasks(["examples"], str(tmp_path), 1), both.model(chat=both.chat()), Topology.single()
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model=both.lm, tasks=["examples"], task_manager=manager, num_fewshot=1, apply_chat_template=True
    )
    for sample, other in zip(ours["samples"]["examples"], theirs["samples"]["examples"], strict=True):
        assert sample["arguments"] == other["arguments"]
        same([each[0] for each in sample["resps"]], [each[0] for each in other["resps"]])
