"""The service over HTTP, with the clients that people use, and with what no client should send."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest

from tests.inference.small_model import SmallEngine, small_config
from tests.serving.service import running
from tools import text_generation_cli


@pytest.fixture(scope="module")
def engine():
    return SmallEngine(small_config())


@pytest.fixture(scope="module")
def small(engine):
    with running(engine=engine) as found:
        yield found


@pytest.fixture
def client(small):
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(running, path, body, method="POST", **headers):
    """(status, answer) of one request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(running.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Nans(SmallEngine):
    """Its scores of a text with a `z` are not numbers."""

    def logits(self, tokens, cache=None, at=None):
        found = super().logits(tokens, cache, at)
        return found * float("nan") if ord("z") in tokens else found


def test_scores_that_are_no_numbers_are_an_error_of_one_request():
    with running(engine=Nans(small_config())) as found:
        body = {"prompt": "a z", "max_tokens": 4, "temperature": 0}
        status, answer = ask(found, "/v1/completions", body)
        assert status == 500 and "not numbers" in answer["error"]["message"]
        assert ask(found, "/api", {"prompts": ["ok", "a z"], "tokens_to_generate": 4}, "PUT")[0] == 500
        data = json.dumps({**body, "stream": True}).encode()
        request = urllib.request.Request(found.url + "/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            events = [json.loads(line[6:]) for line in response.read().decode().splitlines() if line]
        assert [list(event) for event in events] == [["error"]]
        scored = {"prompt": ["ok", "z!"], "max_tokens": 0, "echo": True, "logprobs": 1}
        status, answer = ask(found, "/v1/completions", scored)
        assert status == 500 and "not numbers" in answer["error"]["message"]
        status, answer = ask(found, "/v1/completions", {**body, "prompt": "ok"})
        assert status == 200 and len(answer["choices"][0]["text"]) == 4


def test_the_terminal_client_reports_that_the_model_failed_and_goes_on(monkeypatch, capsys):
    lines = iter(["a z", "ok"])

    def typed(_prompt):
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    with running(engine=Nans(small_config())) as found:
        assert text_generation_cli.main([found.address, "--tokens", "4"]) == 0
    said = capsys.readouterr()
    assert "not numbers" in said.err and len(said.out.splitlines()[-1]) == 4


def idle(running):
    deadline = time.monotonic() + 20
    while running.service._listeners or running.service.worker.running:
        assert time.monotonic() < deadline, "texts are left behind"
        time.sleep(0.02)


def test_the_openai_client_completes_and_streams_the_same(client):
    full = client.completions.create(model="small", prompt="hello", max_tokens=9, temperature=0, logprobs=2)
    assert len(full.choices[0].text) == 9 and full.choices[0].finish_reason == "length"
    assert full.usage.completion_tokens == 9 and full.usage.prompt_tokens == 5
    found = full.choices[0].logprobs
    assert "".join(found.tokens) == full.choices[0].text
    assert all(value <= 0 for value in found.token_logprobs) and all(found.top_logprobs)
    parts = list(client.completions.create(model="small", prompt="hello", max_tokens=9, temperature=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == full.choices[0].text
    assert len(parts) == 10 and parts[-1].choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["small"]


def test_the_token_that_ends_an_answer_has_a_log_probability(client):
    """It is none of the answer's text; lm-eval leaves out one token behind what it scores, whichever that is."""
    ends = {"logit_bias": {"0": 100}, "logprobs": 1, "temperature": 0}
    found = client.completions.create(model="small", prompt="hello", max_tokens=1, echo=True, **ends).choices[0]
    assert (found.text, found.finish_reason) == ("hello", "stop")
    assert len(found.logprobs.tokens) == 6 and found.logprobs.tokens[-1] == "a"
    assert found.logprobs.text_offset == [0, 1, 2, 3, 4, 5]
    assert found.logprobs.token_logprobs[-1] < 0 and len(found.logprobs.top_logprobs[-1]) == 2
    parts = client.completions.create(model="small", prompt="hello", max_tokens=4, stream=True, **ends)
    assert [token for part in parts for token in part.choices[0].logprobs.tokens] == ["a"]
    said = client.completions.create(model="small", prompt="hello", max_tokens=4, **{**ends, "logprobs": None})
    assert (said.choices[0].text, said.choices[0].logprobs) == ("", None)


def test_several_prompts_and_copies_keep_their_order(client):
    found = client.completions.create(model="small", prompt=["a", "bcd"], n=2, max_tokens=6, temperature=0)
    texts = [choice.text for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    tokens = client.completions.create(model="small", prompt=[[97], [98, 99, 100]], max_tokens=6, temperature=0)
    assert [choice.text for choice in tokens.choices] == [texts[0], texts[2]]


def test_seeds_repeat_and_stops_stop(client):
    def text(**how):
        return client.completions.create(model="small", prompt="x", max_tokens=12, **how).choices[0]

    assert text(seed=3).text == text(seed=3).text
    assert len({text(seed=seed).text for seed in range(4)}) > 1
    several = [client.completions.create(model="small", prompt="x", max_tokens=12, n=4, seed=seed) for seed in (5, 6)]
    texts = [{choice.text for choice in found.choices} for found in several]
    assert not texts[0] & texts[1], "texts of seeds close by have nothing in common"
    assert text(seed=6).text in texts[1]
    plain = text(temperature=0).text
    stopped = text(temperature=0, stop=[plain[3:5]])
    assert stopped.text == plain[: plain.index(plain[3:5])] and stopped.finish_reason == "stop"


def test_curl_uses_megatrons_language(small, client):
    body = json.dumps({"prompts": ["hello", "a"], "tokens_to_generate": 5, "top_k": 1, "logprobs": True})
    said = subprocess.run(
        ["curl", "-sS", "-X", "PUT", f"{small.url}/api", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(said.stdout)
    target = client.completions.create(model="small", prompt=["hello", "a"], max_tokens=5, temperature=0)
    assert found["text"] == [
        prompt + choice.text for prompt, choice in zip(("hello", "a"), target.choices, strict=True)
    ]
    assert [len(each) for each in found["logprobs"]] == [5, 5]


@pytest.mark.parametrize(
    ("path", "method", "body", "reported"),
    [
        ("/v1/completions", "POST", b"{", "JSON"),
        ("/v1/completions", "POST", {}, "prompt"),
        ("/v1/completions", "POST", {"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ("/v1/completions", "POST", {"prompt": "a", "max_tokens": "3"}, "max_tokens"),
        ("/v1/completions", "POST", {"prompt": "a", "temperature": -0.5}, "temperature"),
        ("/v1/completions", "POST", b'{"prompt": "a", "temperature": NaN}', "temperature"),
        ("/v1/completions", "POST", {"prompt": "a", "beams": 3}, "beams"),
        ("/v1/completions", "POST", {"prompt": "a", "echo": 1}, "echo"),
        ("/v1/completions", "POST", {"prompt": "a", "max_tokens": 0}, "echo"),
        ("/v1/completions", "POST", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", "POST", {"prompt": "\ud800"}, "surrogate"),
        ("/v1/completions", "POST", {"prompt": ["a", "b\udc00"]}, "surrogate"),
        ("/v1/completions", "POST", {"prompt": "a", "stop": "\ud9ab"}, "surrogate"),
        ("/v1/completions", "POST", {"prompt": "a", "user": "\ud9ab"}, "surrogate"),
        ("/v1/completions", "POST", {"prompt": "a", "model": "\ud9ab"}, "surrogate"),
        ("/v1/completions", "POST", {"prompt": "a", "\ud9ab": 1}, "surrogate"),
        ("/v1/completions", "POST", b'{"prompt": "\xff"}', "body"),
        ("/v1/completions", "POST", b"[" * 100_000, "body"),
        ("/api", "PUT", {"prompts": ["\udfff"]}, "surrogate"),
        ("/v1/completions", "POST", {"prompt": []}, "prompt"),
        ("/v1/completions", "POST", {"prompt": [600]}, "tokens"),
        ("/v1/completions", "POST", {"prompt": "a" * 100}, "100 tokens"),
        ("/v1/completions", "POST", {"prompt": "a", "max_tokens": 48}, "48"),
        ("/v1/completions", "POST", {"prompt": ["a"] * 65, "n": 2}, "128"),
        ("/api", "PUT", {"prompts": []}, "prompts"),
        ("/api", "PUT", {"prompts": ["a"], "tokens_to_generate": 0}, "tokens_to_generate"),
        ("/api", "PUT", {"prompts": ["a"], "top_k": 2, "top_p": 0.5}, "top_k"),
    ],
)
def test_what_cannot_be_done_is_reported(small, path, method, body, reported):
    status, answer = ask(small, path, body, method)
    assert status == 400
    assert reported in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [({"prompt": "a", "beams": 3}, "beams"), ({"prompt": "a", "stop": [""]}, "stop"), (b"{", None)],
)
def test_an_error_names_its_parameter_in_a_field(small, body, param):
    assert ask(small, "/v1/completions", body)[1]["error"]["param"] == param


def test_a_body_that_is_not_called_json_is_reported_so(small):
    """As curl's `-d` sends it without a header."""
    kind = "application/x-www-form-urlencoded"
    status, answer = ask(small, "/v1/completions", {"prompt": "a"}, **{"Content-Type": kind})
    assert status == 400
    assert f"Content-Type: application/json (it is {kind})" in answer["error"]["message"]


def test_what_is_null_is_left_out(small):
    body = {"prompt": "a", "max_tokens": 8, "temperature": 0}
    expected = ask(small, "/v1/completions", body)[1]["choices"]
    for name in ("top_k", "min_p", "repetition_penalty", "seed", "logit_bias", "n", "stop", "echo"):
        assert ask(small, "/v1/completions", {**body, name: None})[1]["choices"] == expected, name


def test_a_huge_body_is_refused_before_it_is_read(small):
    assert ask(small, "/v1/completions", b" " * (1 << 20) + b"{}")[0] == 413
    assert ask(small, "/nowhere", {})[0] == 404
    assert ask(small, "/api", {}, "GET")[0] == 405


def test_health_metrics_and_page(small):
    with urllib.request.urlopen(small.url + "/health") as response:
        assert json.load(response) == {"status": "ok"}
    with urllib.request.urlopen(small.url + "/metrics") as response:
        lines = response.read().decode().splitlines()
    assert "neox_requests_waiting 0" in lines and "# TYPE neox_generated_tokens_total counter" in lines
    with urllib.request.urlopen(small.url + "/") as response:
        assert b"<textarea" in response.read()


def test_the_key_is_required_everywhere_but_on_the_page(engine):
    with running(engine=engine, key="geheim") as found:
        body = {"prompt": "a", "max_tokens": 1}
        assert ask(found, "/v1/completions", body)[0] == 401
        assert ask(found, "/v1/completions", body, Authorization="Bearer geheim ")[0] in (200, 401)
        assert ask(found, "/v1/completions", body, Authorization="Bearer wrong")[0] == 401
        assert ask(found, "/api", {"prompts": ["a"]}, "PUT")[0] == 401
        assert ask(found, "/v1/completions", body, Authorization="bearer  geheim")[0] == 200
        assert ask(found, "/v1/completions", body, Authorization="Bearer geheim")[0] == 200
        with urllib.request.urlopen(found.url + "/health") as response:
            assert response.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(found.url + "/metrics")


def test_a_burst_of_as_many_requests_as_rows_is_never_refused(engine):
    """A client that has its answer may ask again at once, with an empty queue."""
    with running(engine=engine, rows=6, max_waiting=0) as found:

        def one(number):
            body = {"prompt": f"prompt {number}", "max_tokens": 5, "temperature": 0}
            return [ask(found, "/v1/completions", body)[0] for _ in range(10)]

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert {status for each in pool.map(one, range(6)) for status in each} == {200}
        assert found.service.counts.refused == 0


def test_hang_ups_free_their_rows(small, client):
    for _ in range(3):
        stream = client.completions.create(model="small", prompt="hello", max_tokens=40, temperature=0, stream=True)
        next(iter(stream))
        stream.close()
    raw = json.dumps({"prompt": "x", "max_tokens": 40}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    host, port = small.address.split(":")
    with socket.create_connection((host, int(port))) as plain:
        plain.sendall(head % len(raw) + raw)
    idle(small)


def test_too_many_get_429_and_all_others_their_own_text(engine):
    with running(engine=engine, rows=2, max_waiting=2) as found:

        def one(number):
            body = {"prompt": f"prompt {number}", "max_tokens": 20, "temperature": 0}
            status, answer = ask(found, "/v1/completions", body)
            return number, status, answer["choices"][0]["text"] if status == 200 else None

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(one, range(12)))
        assert {status for _, status, _ in answers} == {200, 429}
        idle(found)
        for number, status, text in answers:
            if status == 200:
                assert one(number) == (number, 200, text)
