"""What a request leaves out is the model's own setting, as a client of vLLM expects of a generation_config.json."""

from __future__ import annotations

from functools import partial

import openai
import pytest

from megatron.inference.sampling import Sampling
from megatron.serving.chat_rendering import Conversations
from megatron.serving.requests import Generation
from megatron.tokenizers.chat_template import ChatTemplate
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config
from tests.serving.service import running

OWN = Sampling(temperature=0.6, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.2)


@pytest.mark.parametrize(
    ("body", "own", "expected"),
    [
        ({}, None, Sampling(1.0)),
        ({}, Sampling(repetition_penalty=1.2), Sampling(1.0, repetition_penalty=1.2)),
        ({}, Sampling(top_k=5), Sampling(1.0, top_k=5)),
        ({}, OWN, OWN),
        (dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty")), OWN, OWN),
        ({"temperature": 0.2}, OWN, Sampling(0.2, 20, 0.9, 0.1, 1.2)),
        ({"top_k": 0}, OWN, Sampling(0.6, 0, 0.9, 0.1, 1.2)),
        ({"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}, OWN, Sampling(0.6)),
        ({"top_p": 0.5}, OWN, Sampling(0.6, 20, 0.5, 0.1, 1.2)),
        ({"temperature": 0}, OWN, Sampling(repetition_penalty=1.2)),
        ({"top_p": 0}, None, Sampling()),
        ({"top_p": 0, "temperature": 1.3}, OWN, Sampling(repetition_penalty=1.2)),
    ],
    ids=str,
)
def test_what_is_left_out_is_the_models_own(body, own, expected):
    assert Generation.model_validate(body).sampling(own) == expected


def test_a_stop_of_the_request_replaces_those_of_the_model():
    assert Generation.model_validate({}).stops(("a", "b")) == ("a", "b")
    assert Generation.model_validate({"stop": "c"}).stops(("a", "b")) == ("c",)


def test_the_service_generates_with_the_settings_of_the_model():
    engine = SmallEngine(small_config())

    def texts(**more):
        with running(engine=engine, **more) as found, openai.OpenAI(base_url=f"{found.url}/v1", api_key="-") as client:
            ask = partial(client.completions.create, model="small", prompt="hello", max_tokens=9, seed=5)
            asked = ({}, {"temperature": 0}, {"top_p": 0}, {"stop": ["\0"]})
            return [ask(**each).choices[0].text for each in asked]

    def listed(**more):
        with running(engine=engine, **more) as found, openai.OpenAI(base_url=f"{found.url}/v1", api_key="-") as client:
            scored = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
            return client.completions.create(model="small", prompt="hello", **scored).choices[0].logprobs.tokens

    drawn, likeliest, narrow, _ = texts()
    assert listed(stops=(likeliest[0],)) == listed() and len(listed()) == 6, "scores do not depend on stop texts"
    assert drawn != likeliest == narrow
    end = likeliest[4:6]
    own, *_, unstopped = texts(sampling=Sampling(temperature=0.9, top_k=1), stops=(end,))
    assert unstopped == likeliest and own == likeliest[: likeliest.index(end)]


LENGTHS = {
    "completion": ("completions", {}, (5, 16)),
    "completion, null": ("completions", {"max_tokens": None}, (5, SEQUENCE - 5)),
    "completion, more": ("completions", {"max_tokens": 7}, (7, 7)),
    "chat": ("chat", {}, (5, SEQUENCE - 5)),
    "chat, more": ("chat", {"max_completion_tokens": 7}, (7, 7)),
    "long prompt": ("completions", {"prompt": "a" * (SEQUENCE - 2)}, (2, None)),
}


@pytest.mark.parametrize("own", [5, None])
def test_an_answer_is_as_long_as_the_model_says_where_a_request_does_not(own):
    """With a limit of the model's own, and without."""
    chat = Conversations(ChatTemplate("{{ messages[0].content }}"))
    with (
        running(maximum_tokens=own, conversations=chat) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key="-") as client,
    ):
        for name, (kind, more, lengths) in LENGTHS.items():
            expected = lengths[own is None]
            if expected is None:
                continue
            if kind == "chat":
                turns = [{"role": "user", "content": "hello"}]
                answer = client.chat.completions.create(model="small", messages=turns, temperature=0, **more)
            else:
                body = {"prompt": "hello", **more}
                answer = client.completions.create(model="small", temperature=0, **body)
            assert answer.usage.completion_tokens == expected, name
