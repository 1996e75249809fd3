"""Continuous batching: newcomers start at once, others do not notice, and nothing is left behind."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace

import pytest

from megatron.inference.generation_request import Settings
from megatron.inference.sampling import Sampling
from megatron.serving.scheduler import (
    Callbacks,
    ModelWorker,
    QueuedRequest,
    QueueFull,
    SchedulerStep,
    Service,
    ShuttingDown,
    run_follower,
)
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config
from tests.serving.service import Spelling

PROMPTS = ((7, 30, 41), (5,), tuple(range(60, 85)), (9, 9), (50,) * 9)


@pytest.fixture(scope="module")
def engine():
    return SmallEngine(small_config())


def settings(new=12, **others):
    return Settings(Sampling(), 1, new, SEQUENCE, **others)


def worker(engine, rows=4):
    return ModelWorker(engine, Spelling(), rows=rows, max_length=SEQUENCE)


def alone(engine, prompt, new=12):
    each = worker(engine)
    done = each.follow(SchedulerStep((QueuedRequest(0, prompt, settings(new)),)))
    while not done:
        done = each.follow(SchedulerStep())
    return done[0][1].text


def test_a_newcomer_starts_within_two_steps_and_changes_nothing(engine):
    each, texts = worker(engine), {}
    received = {number: [] for number in range(len(PROMPTS))}
    listeners = {
        number: Callbacks(
            lambda part: None, lambda token, _, to=received[number]: to.append(token), lambda record: None
        )
        for number in received
    }
    for number, prompt in enumerate(PROMPTS[:4]):
        for ended, record in each.follow(SchedulerStep((QueuedRequest(number, prompt, settings()),)), listeners):
            texts[ended] = record.text
        assert len(received[number]) == 1  # its first token came with the very step that took it in
        for ended, record in each.follow(SchedulerStep(), listeners):
            texts[ended] = record.text
    while each.running:
        texts |= {number: record.text for number, record in each.follow(SchedulerStep(), listeners)}
    assert texts == {number: alone(engine, prompt) for number, prompt in enumerate(PROMPTS[:4])}


def test_a_row_that_is_left_serves_the_next_and_others_go_on(engine):
    each = worker(engine, rows=2)
    each.follow(SchedulerStep((QueuedRequest(0, PROMPTS[0], settings(40)), QueuedRequest(1, PROMPTS[1], settings()))))
    each.follow(SchedulerStep())
    assert each.free == 0
    each.follow(SchedulerStep(leaving=(0, 77)))
    assert each.free == 1
    found = dict(each.follow(SchedulerStep((QueuedRequest(2, PROMPTS[4], settings(5)),))))
    while each.running:
        found |= dict(each.follow(SchedulerStep()))
    assert {number: record.text for number, record in found.items()} == {
        1: alone(engine, PROMPTS[1]),
        2: alone(engine, PROMPTS[4], 5),
    }


def collecting(records):
    return Callbacks(lambda part: None, lambda token, logits: None, records.append)


def test_the_queue_is_bounded_and_closing_finishes_what_is_there(engine):
    service, records = Service(worker(engine, rows=2), max_waiting=1), []
    entry = (PROMPTS[0], settings(), "", collecting(records))
    service.submit([entry, entry, entry])
    with pytest.raises(QueueFull):
        service.submit([entry])
    assert (service.counts.requests, service.counts.refused) == (3, 1)
    service.close()
    with pytest.raises(ShuttingDown):
        service.submit([entry])
    service.run()
    assert [record.text for record in records] == [alone(engine, PROMPTS[0])] * 3
    assert service.counts.tokens == 36
    assert service._listeners == {} and service.waiting == 0 and service.worker.running == 0


def test_as_many_requests_as_rows_start_in_one_step(engine):
    """Also without a queue, and behind sequences that are removed."""
    orders = []
    service = Service(worker(engine, rows=4), max_waiting=0, publish=orders.append)
    entry = (PROMPTS[0], settings(), "", collecting([]))
    numbers = [service.submit([entry])[0] for _ in range(4)]
    with pytest.raises(QueueFull):
        service.submit([entry])
    first = service._orders()
    assert [ask.number for ask in first.joining] == numbers
    service.worker.follow(first)
    assert service.worker.running == 4
    service.abandon(numbers[:3])
    further = [service.submit([entry])[0] for _ in range(3)]
    with pytest.raises(QueueFull):
        service.submit([entry])
    second = service._orders()
    assert (second.leaving, [ask.number for ask in second.joining]) == (tuple(numbers[:3]), further)
    service.worker.follow(second)
    assert service.worker.running == 4
    service.close()
    service.run()


def test_waiting_texts_are_counted_once(engine):
    service, records = Service(worker(engine, rows=2), max_waiting=3), []
    entry = (PROMPTS[0], settings(), "", collecting(records))
    service.submit([entry] * 2)
    service.worker.follow(service._orders())
    service.submit([entry])
    service.submit([entry] * 2)
    with pytest.raises(QueueFull):
        service.submit([entry])
    service.close()
    service.run()
    assert len(records) == 5


def test_more_texts_than_there_are_positions_wait_their_turn_when_nobody_else_waits(engine):
    service, records = Service(worker(engine, rows=2), max_waiting=1), []
    entry = (PROMPTS[0], settings(), "", collecting(records))
    service.submit([entry] * 9)
    with pytest.raises(QueueFull):
        service.submit([entry])
    with pytest.raises(QueueFull):
        service.submit([entry] * 9)
    service.close()
    service.run()
    assert [record.text for record in records] == [alone(engine, PROMPTS[0])] * 9


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")], ids=["nan", "raises"])
def test_a_prompt_without_scores_is_an_error_of_its_own_text(engine, error, caplog):
    service, records, scores = Service(worker(Broken(99, error)), max_waiting=9), {}, []
    for number, (prompt, new) in enumerate([(PROMPTS[0], 12), ((7, 99, 7), 0), (PROMPTS[4], 0)]):
        received = replace(
            collecting([]), prompt=scores.append, done=lambda record, at=number: records.update({at: record})
        )
        service.submit([(prompt, settings(new), "", received)], scored=True)
    service.close()
    service.run()
    assert records[1].failed and "error" in records[1].message
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1
    assert records[0].text == alone(engine, PROMPTS[0]) and not records[2].failed
    assert [len(each) for each in scores] == [len(PROMPTS[0]) - 1, len(PROMPTS[4]) - 1]


def test_abandoned_texts_leave_no_trace_wherever_they_are(engine):
    service, records = Service(worker(engine, rows=1), max_waiting=5), []
    numbers = service.submit([(PROMPTS[0], settings(40), "", collecting(records))] * 3)
    thread = threading.Thread(target=service.run)
    thread.start()
    while not service.worker.running:
        time.sleep(0.001)
    service.abandon(numbers[:2])  # one runs, one waits
    service.abandon(numbers[:2])
    service.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(records) == 1 and service.counts.abandoned == 2
    assert service._listeners == {} and service.worker.running == 0


@pytest.mark.parametrize("ends", ["by its client", "by its listener", "by itself"])
def test_every_token_of_the_model_is_counted_once(engine, ends):
    """Of a text whose client leaves after 5 tokens, of one that cannot be handed on, and of one that ends."""
    service, tokens = Service(worker(engine, rows=1), max_waiting=5), []

    def token(number, scores):
        tokens.append(number)
        if len(tokens) == 5 and ends == "by its client":
            service.abandon(numbers)
        if len(tokens) == 5 and ends == "by its listener":
            raise OSError("no listener")

    numbers = service.submit(
        [(PROMPTS[0], settings(40), "", Callbacks(lambda piece: None, token, lambda record: None))]
    )
    service.close()
    service.run()
    assert service.counts.tokens == len(tokens) >= 5
    assert service.counts.abandoned == int(ends == "by its client")


class Broken(SmallEngine):
    """Its scores are NaN, or it raises, as long as a token of the given id is read."""

    def __init__(self, token, error):
        super().__init__(small_config())
        self._token, self._error = token, error

    def logits(self, tokens, cache=None, at=None):
        found = super().logits(tokens, cache, at)
        if self._token not in tokens:
            return found
        if self._error is not None:
            raise self._error
        row = int((tokens == self._token).any(1).nonzero()[0])
        found = found.clone()
        found[row] = math.nan
        return found


def answered(engine, *prompts, listeners=None):
    """What a service makes of prompts that come one after another."""
    service, records = Service(worker(engine), max_waiting=9), {}
    for number, prompt in enumerate(prompts):
        received = (listeners or {}).get(number) or collecting([])
        each = replace(received, done=lambda record, at=number: records.update({at: record}))
        service.submit([(prompt, settings(), "", each)])
    service.close()
    service.run()
    assert service._listeners == {} and service.worker.running == 0 and service.worker.free == 4
    return records


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")], ids=["nan", "raises"])
def test_a_request_that_the_model_fails_on_does_not_end_the_service(engine, error, caplog):
    broken = Broken(99, error)
    records = answered(broken, PROMPTS[0], (99, 7), PROMPTS[1])
    assert records[1].failed and "error" in records[1].message and records[1].length == 0
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1
    if error is None:  # the others are not touched
        for number, prompt in ((0, PROMPTS[0]), (2, PROMPTS[1])):
            assert not records[number].failed and records[number].text == alone(engine, prompt)
    assert not answered(broken, PROMPTS[1])[0].failed


@pytest.mark.parametrize("where", ["piece", "token"])
def test_a_listener_that_fails_ends_its_own_text_only(engine, where):
    def fails(*_):
        raise ValueError("the client is gone")

    received = {1: replace(collecting([]), **{where: fails})}
    records = answered(engine, PROMPTS[0], PROMPTS[1], PROMPTS[4], listeners=received)
    assert records[1].failed
    assert [records[number].text for number in (0, 2)] == [alone(engine, PROMPTS[0]), alone(engine, PROMPTS[4])]


def test_where_ranks_share_a_model_its_errors_end_the_service():
    each = ModelWorker(Broken(99, RuntimeError("lost")), Spelling(), rows=2, max_length=SEQUENCE, alone=False)
    with pytest.raises(RuntimeError, match="lost"):
        each.follow(SchedulerStep((QueuedRequest(0, (99,), settings()),)))


def test_other_ranks_follow_the_orders_of_the_first(engine):
    reported = []
    service = Service(worker(engine, rows=2), max_waiting=9, publish=reported.append)
    service.submit([(prompt, settings(), "", collecting([])) for prompt in PROMPTS])
    service.close()
    service.run()
    follower, orders = worker(engine, rows=2), iter(reported)
    run_follower(follower, lambda: next(orders))
    assert reported[-1].stop and follower.running == 0 and next(orders, None) is None
