"""From the decoding thread to the reader: nothing is lost or mixed up, also where the reader is slow."""

import asyncio

from megatron.inference.generation_request import Settings
from megatron.inference.sampling import Sampling
from megatron.serving.scheduler import ModelWorker, Service
from megatron.serving.streaming import Keep, start
from megatron.serving.token_text import Words
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config
from tests.serving.service import Spelling


def test_a_slow_reader_gets_the_same_in_fewer_events():
    service = Service(ModelWorker(SmallEngine(small_config()), Spelling(), rows=4, max_length=SEQUENCE), 9)
    settings = [Settings(Sampling(), 1, 30, SEQUENCE)] * 3
    prompts = [[97], [98, 99], [100]]

    async def read(slow):
        texts = start(service, Words(Spelling()), prompts, settings, Keep(512, tokens=True))
        service.worker.follow(service._orders(), service._listeners)
        while service._listeners and slow:  # everything has happened before the reader looks
            for number, record in service.worker.follow(service._orders(), service._listeners):
                service._finish(number, record)
        parts, events = ["", "", ""], 0
        reading = texts.events()
        while len(texts.records) < 3:
            if service._listeners and texts.queue.empty():
                for number, record in service.worker.follow(service._orders(), service._listeners):
                    service._finish(number, record)
                await asyncio.sleep(0)
            event = await anext(reading)
            parts[event.index] += event.piece
            events += 1
        assert [record.text for _, record in sorted(texts.records.items())] == parts
        assert [len(tokens) for tokens in texts.tokens] == [30, 30, 30]
        return parts, events

    (slowly, few), (fast, many) = asyncio.run(read(True)), asyncio.run(read(False))
    assert slowly == fast and few == 3 < many
