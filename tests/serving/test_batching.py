"""Continuous batching: newcomers start at once, others do not notice, and nothing is left behind."""

from __future__ import annotations

import threading
import time

import pytest

from megatron.inference.answer import Settings
from megatron.inference.sampling import Sampling
from megatron.serving.batching import Ask, Closing, Full, Listener, Orders, Service, Worker, follow_orders
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config
from tests.serving.service import Spelling

PROMPTS = ((7, 30, 41), (5,), tuple(range(60, 85)), (9, 9), (50,) * 9)


@pytest.fixture(scope="module")
def engine():
    return SmallEngine(small_config())


def settings(new=12, **others):
    return Settings(Sampling(), 1, new, SEQUENCE, **others)


def worker(engine, rows=4):
    return Worker(engine, Spelling(), rows=rows, max_length=SEQUENCE)


def alone(engine, prompt, new=12):
    each = worker(engine)
    done = each.follow(Orders((Ask(0, prompt, settings(new)),)))
    while not done:
        done = each.follow(Orders())
    return done[0][1].text


def test_a_newcomer_starts_within_two_steps_and_changes_nothing(engine):
    each, texts = worker(engine), {}
    heard = {number: [] for number in range(len(PROMPTS))}
    listeners = {
        number: Listener(lambda piece: None, lambda token, _, to=heard[number]: to.append(token), lambda record: None)
        for number in heard
    }
    for number, prompt in enumerate(PROMPTS[:4]):
        for ended, record in each.follow(Orders((Ask(number, prompt, settings()),)), listeners):
            texts[ended] = record.text
        assert len(heard[number]) == 1  # its first token came with the very step that took it in
        for ended, record in each.follow(Orders(), listeners):
            texts[ended] = record.text
    while each.running:
        texts |= {number: record.text for number, record in each.follow(Orders(), listeners)}
    assert texts == {number: alone(engine, prompt) for number, prompt in enumerate(PROMPTS[:4])}


def test_a_row_that_is_left_serves_the_next_and_others_go_on(engine):
    each = worker(engine, rows=2)
    each.follow(Orders((Ask(0, PROMPTS[0], settings(40)), Ask(1, PROMPTS[1], settings()))))
    each.follow(Orders())
    assert each.free == 0
    each.follow(Orders(leaving=(0, 77)))
    assert each.free == 1
    found = dict(each.follow(Orders((Ask(2, PROMPTS[4], settings(5)),))))
    while each.running:
        found |= dict(each.follow(Orders()))
    assert {number: record.text for number, record in found.items()} == {
        1: alone(engine, PROMPTS[1]),
        2: alone(engine, PROMPTS[4], 5),
    }


def collecting(records):
    return Listener(lambda piece: None, lambda token, logits: None, records.append)


def test_the_queue_is_bounded_and_closing_finishes_what_is_there(engine):
    service, records = Service(worker(engine, rows=2), max_waiting=1), []
    entry = (PROMPTS[0], settings(), "", collecting(records))
    service.submit([entry, entry, entry])
    with pytest.raises(Full):
        service.submit([entry])
    assert (service.counts.requests, service.counts.refused) == (3, 1)
    service.close()
    with pytest.raises(Closing):
        service.submit([entry])
    service.run()
    assert [record.text for record in records] == [alone(engine, PROMPTS[0])] * 3
    assert service.counts.tokens == 36
    assert service._listeners == {} and service.waiting == 0 and service.worker.running == 0


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


def test_other_ranks_follow_the_orders_of_the_first(engine):
    told = []
    service = Service(worker(engine, rows=2), max_waiting=9, tell=told.append)
    service.submit([(prompt, settings(), "", collecting([])) for prompt in PROMPTS])
    service.close()
    service.run()
    follower, orders = worker(engine, rows=2), iter(told)
    follow_orders(follower, lambda: next(orders))
    assert told[-1].stop and follower.running == 0 and next(orders, None) is None
