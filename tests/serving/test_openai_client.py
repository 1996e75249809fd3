"""Every parameter of the official client's `create`: each works, or is refused with 400 by its name."""

import inspect

import openai
import pytest
from openai.resources.chat.completions.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from megatron.serving.chat_rendering import Conversations
from megatron.tokenizers.chat_template import ChatTemplate
from tests.inference.small_model import SmallEngine, small_config
from tests.serving.service import running

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if tools %}T{% endif %}"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
# Of each parameter: values that work, and values that are refused by the parameter's name.
SHARED = {
    "model": (["small"], []),
    "frequency_penalty": ([0, 1.5, -2.0], [2.5]),
    "logit_bias": ([{"97": 100}, {}], [{"a": 1}, {"97": 101}, {"600": 1}]),
    "n": ([1, 3], [0, 129]),
    "presence_penalty": ([0, 1.5], [-2.5]),
    "seed": ([0, 7, -(2**63)], [2**63]),
    "stop": (["zzz", ["zzz", "yyy"], []], ["", [""], ["a"] * 17]),
    "stream": ([False, True], []),
    "stream_options": ([], [{"include_usage": True}]),
    "temperature": ([0, 1.3, 2], [-1.0]),
    "top_p": ([0.1, 1], [1.1]),
    "user": (["someone"], []),
}
COMPLETION = SHARED | {
    "prompt": (["a", ["a", "b"], [1, 2], [[1], [2, 3]], ""], [[], [[]], [600]]),
    "best_of": ([1], [2]),
    "echo": ([False, True], []),
    "logprobs": ([0, 5], [21]),
    "max_tokens": ([1, 9], [0]),
    "suffix": ([], ["b"]),
}
CHAT = SHARED | {
    "messages": (
        [HI, [*HI, {"role": "assistant", "content": "x"}, *HI]],
        [[], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]],
    ),
    "audio": ([], [{"voice": "ash", "format": "wav"}]),
    "function_call": ([], ["auto"]),
    "functions": ([], [[{"name": "f"}]]),
    "logprobs": ([False, True], []),
    "max_completion_tokens": ([1, 9], [0]),
    "max_tokens": ([1, 9], [0]),
    "metadata": ([], [{"a": "b"}]),
    "modalities": ([["text"]], [["text", "audio"]]),
    "moderation": ([], [{"model": "x"}]),
    "parallel_tool_calls": ([], [False, True]),
    "prediction": ([], [{"type": "content", "content": "x"}]),
    "prompt_cache_key": (["k"], []),
    "prompt_cache_options": ([], [{}]),
    "prompt_cache_retention": ([], ["24h"]),
    "reasoning_effort": ([], ["low"]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}]),
    "safety_identifier": (["k"], []),
    "service_tier": ([], ["auto"]),
    "store": ([False], [True]),
    "tool_choice": (["none"], ["auto", "required"]),
    "tools": ([[TOOL], []], [[1]]),
    "top_logprobs": ([], [3]),
    "verbosity": ([], ["low"]),
    "web_search_options": ([], [{}]),
}
TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
KINDS = {"completions": (Completions, COMPLETION), "chat": (ChatCompletions, CHAT)}


@pytest.fixture(scope="module")
def client():
    chat = Conversations(ChatTemplate(TEMPLATE))
    with (
        running(engine=SmallEngine(small_config()), conversations=chat) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def create(client, kind, **how):
    if kind == "completions":
        return client.completions.create(**{"model": "small", "prompt": "ab", "max_tokens": 4, **how})
    length = {} if {"max_tokens", "max_completion_tokens"} & how.keys() else {"max_tokens": 4}
    return client.chat.completions.create(**{"model": "small", "messages": HI, **length, **how})


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_know_every_parameter(kind):
    resource, table = KINDS[kind]
    assert set(table) == set(inspect.signature(resource.create).parameters) - TRANSPORT


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (_, table) in KINDS.items() for name in table])
def test_a_parameter_works_or_is_refused_by_its_name(client, kind, name):
    works, refused = KINDS[kind][1][name]
    assert works or refused
    for value in works:
        found = create(client, kind, **{name: value})
        choices = [choice for part in found for choice in part.choices] if value is True and name == "stream" else []
        assert choices or (found.choices and found.usage.total_tokens > 0 and found.system_fingerprint)
    for value in refused:
        with pytest.raises(openai.BadRequestError) as error:
            create(client, kind, **{name: value})
        assert name in error.value.body["message"] and error.value.body["type"] == "invalid_request_error"
        assert error.value.param in (None, name)


def test_another_model_is_not_found(client):
    for kind in KINDS:
        with pytest.raises(openai.NotFoundError) as error:
            create(client, kind, model="gpt-5")
        assert error.value.code == "model_not_found" and "gpt-5" in error.value.body["message"]
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-5")
    assert error.value.code == "model_not_found"
    assert client.models.retrieve("small") == next(iter(client.models.list()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_reports_what_the_full_answer_reports(client, kind):
    for how in ({"logprobs": True, "top_logprobs": 2} if kind == "chat" else {"logprobs": 2}, {"n": 2}):
        full = create(client, kind, temperature=0, **how)
        parts = list(create(client, kind, temperature=0, stream=True, stream_options={"include_usage": True}, **how))
        assert parts[-1].usage == full.usage and parts[-1].choices == []
        assert all(part.usage is None for part in parts[:-1])
        assert len({part.id for part in parts}) == 1 and full.id != parts[0].id
        for choice in full.choices:
            mine = [each for part in parts for each in part.choices if each.index == choice.index]
            assert mine[-1].finish_reason == choice.finish_reason == "length"
            assert all(each.finish_reason is None for each in mine[:-1])
            if kind == "chat":
                assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
                assert "".join(each.delta.content or "" for each in mine) == choice.message.content
                scored = [token for each in mine if each.logprobs for token in each.logprobs.content]
                assert scored == (choice.logprobs.content if choice.logprobs else [])
            else:
                assert "".join(each.text for each in mine) == choice.text
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    reported = [entry for each in mine if each.logprobs for entry in getattr(each.logprobs, name)]
                    assert reported == (getattr(choice.logprobs, name) if choice.logprobs else [])


def test_biases_and_penalties_move_the_choice(client):
    def text(**how):
        return client.completions.create(model="small", prompt="x", max_tokens=12, temperature=0, **how).choices[0].text

    plain = text()
    assert text(logit_bias={"101": 100}) == "x" * 12 != plain  # 101 % 26 is the place of the x
    assert text(logit_bias={"101": 0}) == plain
    other = text(logit_bias={"101": 100, "102": 100})
    assert text(logit_bias={"101": 100, "102": 100}, frequency_penalty=2) != other
