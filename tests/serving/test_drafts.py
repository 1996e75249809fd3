"""Continuous batching with drafts: texts are those without, whoever joins, leaves or fails beside them."""

from __future__ import annotations

from functools import partial

import pytest

from megatron.inference.drafting_loop import DraftingLoop
from megatron.inference.generation_request import Settings
from megatron.inference.sampling import Sampling
from megatron.serving.scheduler import ModelWorker, QueuedRequest, SchedulerStep, Service
from megatron.serving.status_endpoints import exposition
from tests.inference.test_drafting_loop import DEPTHS, PROMPTS, Model
from tests.model.test_multi_token import LENGTH, VOCABULARY
from tests.serving.service import Spelling

SAMPLED = Sampling(temperature=0.7, top_k=20)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def worker(model: Model, *, drafts: bool) -> ModelWorker:
    loop = partial(DraftingLoop, drafter=model.drafter, tokens=DEPTHS, vocab_size=VOCABULARY)
    more = {"make": loop} if drafts else {}
    return ModelWorker(model, Spelling(), rows=3, max_length=LENGTH + 12, **more)


def order(number: int, new: int = 14) -> QueuedRequest:
    sampling = SAMPLED if number % 2 else Sampling()
    return QueuedRequest(number, tuple(PROMPTS[number]), Settings(sampling, 1, new + number, LENGTH + 12))


def served(each: ModelWorker) -> dict[int, str]:
    """Texts of requests that come while others grow, one of which leaves."""
    texts = {}
    steps = [SchedulerStep((order(0), order(1))), SchedulerStep(), SchedulerStep((order(2),)), SchedulerStep()]
    steps += [SchedulerStep(leaving=(1,)), SchedulerStep((order(3),)), SchedulerStep()]
    for step in steps:
        texts |= dict(each.follow(step))
    while each.running:
        texts |= dict(each.follow(SchedulerStep()))
    return {number: record.text for number, record in texts.items()}


def test_texts_are_those_without_drafts(model: Model) -> None:
    before = model.drafter.counts.accepted
    texts = served(worker(model, drafts=True))
    assert texts == served(worker(model, drafts=False))
    assert texts.keys() == {0, 2, 3}
    assert model.drafter.counts.accepted > before


def test_a_prompt_that_fails_takes_no_other_text_with_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = worker(model, drafts=False)
    expected.follow(SchedulerStep((order(0),)))
    while not (alone := expected.follow(SchedulerStep())):
        pass
    each = worker(model, drafts=True)
    each.follow(SchedulerStep((order(0),)))

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(DraftingLoop, "_read", fail)
        ((number, failed),) = each.follow(SchedulerStep((order(2),)))
    assert (number, failed.text) == (2, None)
    assert "MemoryError" in str(failed.message)
    while not (done := each.follow(SchedulerStep())):
        pass
    assert done[0][1].text == alone[0][1].text


def test_drafts_are_counted_where_monitors_look(model: Model) -> None:
    service = Service(worker(model, drafts=True), 2, drafts=model.drafter.counts)
    assert f"neox_drafted_tokens_total {model.drafter.counts.proposed}\n" in exposition(service)
    assert "drafted" not in exposition(Service(worker(model, drafts=False), 2))
