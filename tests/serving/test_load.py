"""Many clients at once, some of which leave in the middle, and requests that no person would write."""

from __future__ import annotations

import concurrent.futures
import itertools
import random
import time
from pathlib import Path

import openai
import pytest

from tests.inference.small_model import SmallEngine, small_config
from tests.serving.service import running
from tests.serving.test_api import idle

CLIENTS = 64


@pytest.fixture(scope="module")
def engine():
    return SmallEngine(small_config())


def resident() -> int:
    """Memory of this process [bytes]."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def bombard(engine, seconds: float) -> None:
    """No error but 429, no text that belongs to another, nothing left behind."""
    with running(engine=engine, rows=8, max_waiting=32) as found:
        with openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as client:
            prompts = [f"prompt {number}" for number in range(5)]
            wanted = {
                prompt: client.completions.create(model="small", prompt=prompt, max_tokens=16, temperature=0)
                .choices[0]
                .text
                for prompt in prompts
            }
            assert len(set(wanted.values())) == len(prompts)
            before, end = resident(), time.monotonic() + seconds

            def one(number: int) -> tuple[int, int]:
                chance, done, refused = random.Random(number), 0, 0
                while time.monotonic() < end:
                    prompt = chance.choice(prompts)
                    leaves = chance.random() < 0.1
                    try:
                        stream = client.completions.create(
                            model="small", prompt=prompt, max_tokens=16, temperature=0, stream=True
                        )
                        text = ""
                        for piece in stream:
                            text += piece.choices[0].text
                            if leaves and text:
                                stream.close()
                                break
                        assert text == wanted[prompt] or (leaves and wanted[prompt].startswith(text))
                        done += 1
                    except openai.RateLimitError:
                        refused += 1
                        time.sleep(0.05)
                return done, refused

            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                counts = list(pool.map(one, range(CLIENTS)))
        idle(found)
        assert sum(done for done, _ in counts) > CLIENTS / 2 and sum(refused for _, refused in counts) > 0
        assert resident() - before < 300 << 20


def test_many_clients_for_a_while(engine):
    bombard(engine, 15)


@pytest.mark.long
def test_many_clients_for_five_minutes(engine):
    bombard(engine, 300)


def codes_of(operation, mode, wanted):
    """The status codes of 40 requests of one kind, each of which passes the checks."""
    from hypothesis import HealthCheck, Phase, given, settings

    codes = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case):
        answer = case.call_and_validate(checks=wanted)
        codes.add(answer.status_code)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    send()
    return codes


@pytest.mark.long
def test_no_request_that_the_description_allows_or_forbids_breaks_it(engine):
    """Answers are as described, and what the description forbids is refused with a message."""
    import schemathesis
    from schemathesis import GenerationMode, checks

    checks.load_all_checks()
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    wanted = checks.CHECKS.get_by_names([*names, "negative_data_rejection"])
    seen = {}
    with running(engine=engine) as found:
        schema = schemathesis.openapi.from_url(f"{found.url}/openapi.json")
        operations = [each.ok() for each in schema.get_all_operations()]
        assert {each.path for each in operations} == {"/v1/models", "/v1/completions", "/api", "/health", "/metrics"}
        for operation, mode in itertools.product(operations, GenerationMode):
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing is forbidden there

            seen[operation.path, mode] = codes_of(operation, mode, wanted)
        idle(found)
    assert 200 in seen["/v1/completions", GenerationMode.POSITIVE] and 200 in seen["/api", GenerationMode.POSITIVE]
    assert seen["/v1/completions", GenerationMode.NEGATIVE] == seen["/api", GenerationMode.NEGATIVE] == {400}
