"""Many clients at once, some of which leave in the middle."""

from __future__ import annotations

import concurrent.futures
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
            expected = {
                prompt: client.completions.create(model="small", prompt=prompt, max_tokens=16, temperature=0)
                .choices[0]
                .text
                for prompt in prompts
            }
            assert len(set(expected.values())) == len(prompts)
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
                        for part in stream:
                            text += part.choices[0].text
                            if leaves and text:
                                stream.close()
                                break
                        assert text == expected[prompt] or (leaves and expected[prompt].startswith(text))
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
    bombard(engine, 5)


@pytest.mark.long
def test_many_clients_for_five_minutes(engine):
    bombard(engine, 300)
