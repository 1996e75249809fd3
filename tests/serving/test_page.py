"""The page at `/` in a real browser: a person types a prompt, watches tokens arrive, stops them and goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import pytest

from tests.inference.small_model import SmallEngine, small_config
from tests.serving.browser import Browser, browser
from tests.serving.service import Running, running
from tests.serving.test_api import idle

pytestmark = pytest.mark.system


class Slow(SmallEngine):
    """A model that takes its time, so that tokens can be watched."""

    seconds = 0.0

    def logits(self, *arguments, **others):
        time.sleep(self.seconds)
        return super().logits(*arguments, **others)


@pytest.fixture(scope="module")
def engine() -> Slow:
    return Slow(small_config())


@pytest.fixture(scope="module")
def service(engine: Slow) -> Iterator[Running]:
    with running(engine=engine) as found:
        yield found


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def page(window: Browser, service: Running, engine: Slow) -> Iterator[Browser]:
    """The page, freshly opened, for greedy texts."""
    engine.seconds = 0.0
    window.open(service.url)
    window.type("#temperature", "0")
    yield window
    engine.seconds = 0.0
    idle(service)


def greedy(service: Running, prompt: str, tokens: int) -> str:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        found = client.completions.create(model="small", prompt=prompt, max_tokens=tokens, temperature=0)
        return found.choices[0].text


def generate(page: Browser, prompt: str, tokens: int) -> None:
    page.type("#prompt", prompt)
    page.type("#tokens", str(tokens))
    page.click("#go")


def test_a_prompt_becomes_the_text_that_the_service_gives(page: Browser, service: Running) -> None:
    generate(page, "hello", 12)
    page.wait(lambda: page.text("#state").startswith("12 tokens in"))
    assert page.text("#made") == greedy(service, "hello", 12)
    assert page.text("#answer") == "hello" + page.text("#made")
    assert page.text("#model") == "small"
    assert page.complaints() == []


def test_tokens_appear_one_after_another_and_stop_stops_them(page: Browser, service: Running, engine: Slow) -> None:
    engine.seconds = 0.1
    before = service.service.counts.abandoned
    generate(page, "hello", 40)
    page.wait(lambda: len(page.text("#made")) >= 2)
    first = page.text("#made")
    page.wait(lambda: len(page.text("#made")) > len(first))
    page.click("#stop")
    page.wait(lambda: page.text("#state") == "stopped")
    stopped = page.text("#made")
    assert stopped.startswith(first) and len(stopped) < 40
    engine.seconds = 0.0
    idle(service)
    assert service.service.counts.abandoned == before + 1
    assert greedy(service, "hello", 40).startswith(stopped)


def test_a_text_goes_on_from_its_end(page: Browser, service: Running) -> None:
    generate(page, "ab", 5)
    page.wait(lambda: page.text("#state").startswith("5 tokens in"))
    full = page.text("#answer")
    page.click("#further")
    page.wait(lambda: page.text("#answer").startswith(full) and page.text("#state").startswith("5 tokens in"))
    assert page.text("#made") == greedy(service, full, 5)


def test_what_cannot_be_done_is_reported_and_markup_stays_text(page: Browser) -> None:
    generate(page, "<b>x</b>" * 10, 12)
    page.wait(lambda: "context is 48 tokens" in page.text("#state"))
    assert page.run("return document.querySelector('#state').classList.contains('error')")
    assert page.run("return document.querySelectorAll('#answer b').length") == 0
    assert not page.run("return document.querySelector('#go').disabled")


def test_a_seed_repeats_a_sampled_text(page: Browser) -> None:
    texts = []
    page.type("#temperature", "1.5")
    for seed in ("3", "3", "4"):
        page.type("#seed", seed)
        generate(page, "hello", 12)
        page.wait(lambda: "tokens in" in page.text("#state"))
        texts.append(page.text("#made"))
    assert texts[0] == texts[1] != texts[2]


def test_a_key_is_sent_where_one_is_expected(window: Browser, engine: Slow) -> None:
    with running(engine=engine, key="geheim") as found:
        window.open(found.url)
        window.type("#temperature", "0")
        generate(window, "hello", 4)
        window.wait(lambda: "the key is missing or wrong" in window.text("#state"))
        window.type("#key", "geheim")
        window.click("#go")
        window.wait(lambda: window.text("#state").startswith("4 tokens in"))
        assert window.text("#model") == "small"
        idle(found)
