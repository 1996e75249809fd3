"""Requests that no person would write: each is answered with JSON, and no other client notices."""

from __future__ import annotations

import itertools
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from megatron.serving.chat_rendering import Conversations
from megatron.tokenizers.chat_template import ChatTemplate
from tests.inference.small_model import SmallEngine, small_config
from tests.serving.service import Running, running
from tests.serving.test_api import ask, idle

# As JSON is written: some of these are not what Python would write.
NUMBERS = (
    *("0", "-0.0", "1", "-1", "0.5", "1.0000000000000002", "5e-324", "2.2e-308", "1e-36", "1e-7", "1e7"),
    *("1.7976931348623157e308", "1e309", "-1e309", "NaN", "Infinity", "-Infinity", "2147483648"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616"),
    *("1" + "0" * 400, "1" + "0" * 5000),
)
VALUES = (*NUMBERS, "true", "null", '"1"', '""', "[]", "{}", "[0.1]", '"\\ud800"')
SHARED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
SHARED = (*SHARED, "seed", "n", "max_tokens", "logit_bias", "stop", "stream", "model", "user")
BODIES = {
    ("POST", "/v1/completions"): (
        {"prompt": "ab", "max_tokens": 2},
        (*SHARED, "logprobs", "best_of", "echo", "prompt"),
    ),
    ("POST", "/v1/chat/completions"): (
        {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2},
        (*SHARED, "top_logprobs", "messages", "chat_template_kwargs", "tools", "max_completion_tokens"),
    ),
    ("PUT", "/api"): (
        {"prompts": ["ab"], "tokens_to_generate": 2},
        ("temperature", "top_p", "top_k", "random_seed", "tokens_to_generate", "logprobs", "prompts"),
    ),
}
PROMPT = {"prompt": "someone else", "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    chat = Conversations(
        ChatTemplate("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ tools }}{{ a }}")
    )
    with running(engine=SmallEngine(small_config()), conversations=chat, max_waiting=256) as found:
        yield found


@pytest.fixture
def another(small: Running) -> Iterator[None]:
    """Another client, who gets the same greedy text all the time."""
    over, texts = threading.Event(), []

    def write() -> str:
        status, answer = ask(small, "/v1/completions", PROMPT)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def go_on() -> None:
        while not over.wait(0.01):
            texts.append(write())

    alone = write()
    thread = threading.Thread(target=go_on)
    thread.start()
    yield
    over.set()
    thread.join(60)
    idle(small)
    assert not thread.is_alive() and texts and set(texts) == {alone} == {write()}


def edges() -> Iterator[tuple[str, str, bytes]]:
    """Bodies with one value at an edge."""
    for (method, path), (body, fields) in BODIES.items():
        for field, value in itertools.product(fields, VALUES):
            raw = f'{{"97": {value}}}' if field == "logit_bias" else value
            rest = json.dumps({name: each for name, each in body.items() if name != field})[1:-1]
            yield method, path, f"{{{rest}{', ' if rest else ''}{json.dumps(field)}: {raw}}}".encode()


def answered(small: Running, method: str, path: str, body: bytes) -> int:
    """The status of a request whose answer is JSON, or a stream of events."""
    request = urllib.request.Request(small.url + path, body, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, text = int(response.status), response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    events = [line[6:] for line in text.splitlines() if line] if text.startswith("data: ") else [text]
    reported = [json.loads(each, parse_constant=pytest.fail) for each in events if each != "[DONE]"]
    assert any("error" in each for each in reported) == (status >= 400), body
    return status


def at_edges(small: Running, step: int) -> None:
    every = list(edges())[::step]
    codes = {body: answered(small, method, path, body) for method, path, body in every}
    assert set(codes.values()) == {200, 400} | ({404} if 404 in codes.values() else set())
    assert {path for _, path, body in every if codes[body] == 200} == {path for _, path in BODIES}


def test_values_at_edges_are_answered(small: Running, another: None) -> None:
    at_edges(small, 11)


@pytest.mark.long
def test_all_values_at_edges_are_answered(small: Running, another: None) -> None:
    at_edges(small, 1)


def codes_of(operation, mode, requested, number):
    """The status codes of some requests of one kind, each of which passes the checks."""
    from hypothesis import HealthCheck, Phase, given, settings

    codes = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case):
        answer = case.call_and_validate(checks=requested)
        codes.add(answer.status_code)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    send()
    return codes


def by_the_description(small, number):
    """The status codes of each path: answers are as described, and what the description forbids is refused."""
    import schemathesis
    from schemathesis import GenerationMode, checks

    checks.load_all_checks()
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    requested = checks.CHECKS.get_by_names([*names, "negative_data_rejection"])
    seen = {}
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    paths = {"/v1/models", "/v1/models/{name}", "/health", "/metrics"}
    assert {each.path for each in operations} == paths | {path for _, path in BODIES}
    for operation, mode in itertools.product(operations, GenerationMode):
        reads = operation.method == "get"
        if mode is GenerationMode.NEGATIVE and reads:
            continue  # nothing is forbidden there
        seen[operation.path, mode] = codes_of(operation, mode, requested, min(number, 20) if reads else number)
    for _, path in BODIES:
        assert seen[path, GenerationMode.NEGATIVE] <= {400}
        assert seen[path, GenerationMode.POSITIVE] <= {200, 400, 404}
    return seen


def test_a_few_requests_by_the_description_are_answered(small: Running, another: None) -> None:
    by_the_description(small, 5)


@pytest.mark.long
def test_many_requests_by_the_description_are_answered(small: Running, another: None) -> None:
    seen = by_the_description(small, 250)
    # Random names are not the model's, and random messages mostly name another one.
    assert {path for (path, _), codes in seen.items() if 200 in codes} >= {"/v1/models", "/v1/completions", "/api"}
