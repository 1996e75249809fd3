"""lm-eval's clients of OpenAI's interface say of the service what its own adapter says of the model, one by one."""

import json
import urllib.request

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from megatron.serving.chat_rendering import Conversations
from tests.evaluation.twins import LENGTH, twins
from tests.serving.service import running
from tests.tokenizers import made

PAIRS = [
    ("Hello world, this is", " a small test"),
    ("the quick brown fox ", "jumps over"),
    ("def read(self, n):\n    return", " self.data[:n]\n"),
    ("names and", " é 東京"),
    ("", "Hello world"),
    ("long " * 12, " context"),
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello"),
]
TURNS = [
    [{"role": "user", "content": "Is this a small test?"}],
    [
        {"role": "user", "content": "the quick brown fox"},
        {"role": "assistant", "content": " jumps over it. "},
        {"role": "user", "content": "and the rain?"},
    ],
]
KINDS = {"llama2": made.llama2, "llama3": made.llama3, "chatml": made.chatml}


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory):
    both = twins(KINDS[request.param](tmp_path_factory.mktemp("twins")), "PretrainedFromHF")
    vocabulary, chat = both.theirs.config.vocab_size, Conversations(both.chat())
    how = {"vocabulary": vocabulary, "conversations": chat, "rows": 3}
    with running(engine=both.engine, tokenizer=both.tokenizer, length=LENGTH, **how) as found:
        yield both, found


def harness(served, kind=LocalCompletionsAPI, path="completions", **how):
    both, found = served
    return kind(
        model="small",
        base_url=f"{found.url}/v1/{path}",
        tokenizer_backend="huggingface",
        tokenizer=str(both.folder),
        add_bos_token=bool(both.tokenizer.prefix_ids),
        max_length=LENGTH,
        max_retries=1,
        **how,
    )


def asked(kind, arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.mark.parametrize("how", [{"batch_size": 4}, {"tokenized_requests": False}], ids=["tokens", "texts"])
def test_log_likelihoods_are_those_of_evaluate(served, how):
    both, _ = served
    client = harness(served, **how)
    # An answer without a token of its own is scored 0.0 by lm-eval 0.4.13 itself.
    texts = [pair for pair in PAIRS if not pair[0] or client._encode_pair(*pair)[1]]
    assert len(texts) >= len(PAIRS) - 1
    ours = both.model().loglikelihood(asked("loglikelihood", texts))
    theirs = client.loglikelihood(asked("loglikelihood", texts), disable_tqdm=True)
    assert [score for score, _ in theirs] == pytest.approx([score for score, _ in ours], abs=1e-4)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]


@pytest.mark.parametrize("how", [{"batch_size": 2}, {"tokenized_requests": False}], ids=["tokens", "texts"])
def test_answers_are_those_of_evaluate(served, how):
    both, _ = served
    arguments = {"until": ["\n\n", "q"], "max_gen_toks": 12}
    requests = asked("generate_until", [(context, dict(arguments)) for context, _ in PAIRS if 0 < len(context) < 80])
    ours = both.model().generate_until(requests)
    theirs = harness(served, **how).generate_until(requests, disable_tqdm=True)
    assert len(set(ours)) > 3
    # lm-eval's models decode an answer alone, so that decoders of LLaMA's kind take its first blank away.
    assert [text.removeprefix(" ") for text in theirs] == [text.removeprefix(" ") for text in ours]


def test_chat_answers_are_those_of_evaluate_with_the_chat_template(served):
    both, _ = served
    model = both.model(chat=both.chat())
    client = harness(served, LocalChatCompletion, "chat/completions", tokenized_requests=False)
    arguments = {"until": ["\n\n", "q"], "max_gen_toks": 12}
    ours = [(model.apply_chat_template(turns), dict(arguments)) for turns in TURNS]
    theirs = [(client.apply_chat_template(turns), dict(arguments)) for turns in TURNS]
    expected = model.generate_until(asked("generate_until", ours))
    found = client.generate_until(asked("generate_until", theirs), disable_tqdm=True)
    assert [text.removeprefix(" ") for text in found] == [text.removeprefix(" ") for text in expected]


def post(served, path, body):
    request = urllib.request.Request(
        served[1].url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_scores_of_a_prompt_alone(served):
    """`max_tokens: 0` with `echo` gives the prompt's own scores, whatever way it is written."""
    both, _ = served
    text = "Hello é 東京 world"
    ids = both.tokenizer.encode_with_special_tokens(text)
    full = [*both.tokenizer.prefix_ids, *ids]
    body = {"max_tokens": 0, "echo": True, "logprobs": 3}
    (one,) = post(served, "/v1/completions", {"prompt": text, **body})["choices"]
    (other,) = post(served, "/v1/completions", {"prompt": full, **body})["choices"]
    scores = one["logprobs"]
    assert scores["token_logprobs"] == other["logprobs"]["token_logprobs"] and one["finish_reason"] == "length"
    assert one["text"] == text and other["text"].endswith(text)
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert all(len(scores[name]) == len(full) for name in ("tokens", "text_offset", "top_logprobs"))
    assert max(scores["top_logprobs"][1].values()) >= scores["token_logprobs"][1]
    begin = len(both.tokenizer.prefix_ids) + 1
    with torch.no_grad():
        expected = both.theirs(torch.tensor([full])).logits[0].double().log_softmax(-1)
    own = [float(row[token]) for row, token in zip(expected, full[1:], strict=False)]
    assert scores["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
    likeliest = [sorted(row.tolist())[-3:][::-1] for row in expected[:-1]]
    for found, target in zip(scores["top_logprobs"][1:], likeliest, strict=True):
        assert list(found.values())[:3] == pytest.approx(target, abs=1e-4)
    positions = scores["text_offset"]
    assert positions == sorted(positions) and positions[begin - 1] == 0
    for token, position in zip(scores["tokens"][begin - 1 :], positions[begin - 1 :], strict=True):
        if not token.startswith("bytes:"):
            assert text.startswith(token.removeprefix(" ") if position == 0 else token, position)
    parts = [token for token in scores["tokens"] if token.startswith("bytes:")]
    spelt = bytes(int(each, 16) for token in parts for each in token.removeprefix("bytes:\\x").split("\\x"))
    assert spelt.decode() == "é東京"
    plain = post(served, "/v1/completions", {"prompt": [text, text], "max_tokens": 0, "echo": True})
    assert [choice["text"] for choice in plain["choices"]] == [text, text] and plain["usage"]["completion_tokens"] == 0


def test_tokens_behind_a_stop_text_are_not_listed(served):
    words = served[0].tokenizer
    # Bytes that are no characters change the text of those before them.
    parts = [token for token in range(words.vocab_size) if "\ufffd" in words.decode([token])]
    banned = {str(token): -100 for token in parts}
    prompt, how = "the rain", {"max_tokens": 12, "temperature": 0, "logprobs": 1, "logit_bias": banned}
    (plain,) = post(served, "/v1/completions", {"prompt": prompt, **how})["choices"]
    text, tokens, positions = plain["text"], plain["logprobs"]["tokens"], plain["logprobs"]["text_offset"]
    assert "".join(tokens) == text and positions == [len("".join(tokens[:at])) for at in range(12)]
    at = next(at for at in range(2, 11) if text.find(text[positions[at] :][:3]) == positions[at])
    for stop, retained in (
        (text[positions[at] :][:3], at),
        (text[positions[at] + 1 :][:3], at + (len(tokens[at]) > 1)),
    ):
        (cut,) = post(served, "/v1/completions", {"prompt": prompt, **how, "stop": stop})["choices"]
        assert cut["text"] == text[: text.find(stop)] and cut["finish_reason"] == "stop"
        if text.find(stop) >= positions[at]:
            assert cut["logprobs"]["tokens"] == tokens[:retained]
    (echoed,) = post(served, "/v1/completions", {"prompt": prompt, **how, "echo": True})["choices"]
    assert echoed["text"] == prompt + text
    assert [position - len(prompt) for position in echoed["logprobs"]["text_offset"][-12:]] == positions


def test_megatrons_segments_are_the_text_in_parts(served):
    both, found = served
    prompts = ["the rain fell", "<|im_start|>user\né 東京", "<s>[INST] Hi [/INST]", "<|begin_of_text|>a"]
    request = urllib.request.Request(
        f"{found.url}/api",
        json.dumps({"prompts": prompts, "tokens_to_generate": 9, "top_k": 1, "logprobs": True}).encode(),
        {"Content-Type": "application/json"},
        method="PUT",
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    texts = post(served, "/v1/completions", {"prompt": prompts, "max_tokens": 9, "temperature": 0})["choices"]
    for prompt, text, segments, scores, target in zip(
        prompts, answer["text"], answer["segments"], answer["logprobs"], texts, strict=True
    ):
        assert text == "".join(segments) == prompt + target["text"]
        assert len(segments) == len(scores) + len(
            post(served, "/v1/completions", {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0})[
                "choices"
            ][0]["logprobs"]["tokens"]
        )
        special = [each for each in both.tokenizer.special_tokens if each in prompt]
        assert all(each in segments for each in special)
