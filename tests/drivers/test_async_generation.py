"""Events on the spot (`divert`): the same as by `take`, which keeps what may end a sample. The rest of
`AsyncGeneration` is tested in `test_slow_readers.py` and with every route."""

import asyncio

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

from multilora.engine.messages import Output
from multilora.errors import EngineRestarting, MultiloraError
from multilora.front.generation import Job
from multilora.params import SamplingParams

IDS = list(range(3, 43))


def server() -> LocalServer:
    return LocalServer(FakeEngineClient(answer=lambda _: IDS), byte_level_tokenizer())


class Reading:
    """A generation that is read both ways."""

    def __init__(self):
        self.ready = True
        self.direct = []
        self.taken = []
        self.order = []

    async def read(self, s: LocalServer, **sampling):
        job = Job(prompt=[5], sampling=SamplingParams(max_new_tokens=len(IDS), **sampling))
        generation = await s.driver.generate([job])
        generation.divert(lambda: self.ready, self.receive)
        while (events := await generation.take()) is not None:
            for _, delta in events:
                self.taken.append(delta)
                self.order += delta.token_ids
        return generation.samples[0]

    def receive(self, sample, delta):
        self.direct.append(delta)
        self.order += delta.token_ids


def test_events_come_on_the_spot_and_the_ending_by_take():
    reading = Reading()
    sample = run(reading.read(server()))
    assert reading.order == sample.stream.token_ids == IDS
    assert len(reading.direct) > len(IDS) // 2
    assert all(delta.finished is None for delta in reading.direct)
    assert reading.taken[-1].finished is not None
    assert sample.started and sample.seconds > 0


def test_nothing_is_given_to_who_is_not_ready():
    reading = Reading()
    reading.ready = False
    run(reading.read(server()))
    assert reading.direct == [] and reading.order == IDS


def test_what_text_may_end_is_left_to_take():
    reading = Reading()
    run(reading.read(server(), stop="never seen"))
    assert reading.direct == [] and reading.order == IDS


def test_what_comes_faster_than_the_loop_turns_is_left_to_take():
    s = server()
    reading = Reading()

    async def scenario():
        s.client.gate.clear()
        task = asyncio.create_task(reading.read(s))
        while not s.client._running:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        [(_, deliver)] = s.client._running.values()
        for token in IDS[:3]:
            deliver(Output(rid=s.client.submitted[0].rid, token_ids=[token]))
        assert reading.order == IDS[:1]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert reading.order == IDS[:3] and len(reading.taken) == 2
        task.cancel()

    run(scenario())


def test_an_error_of_the_receiver_ends_this_stream_alone(caplog):
    s = server()

    async def broken():
        generation = await s.driver.generate([Job(prompt=[5], sampling=SamplingParams(max_new_tokens=9))])
        generation.divert(lambda: True, lambda sample, delta: 1 / 0)
        with pytest.raises(MultiloraError, match="internal error: ZeroDivisionError"):
            await generation.results()
        return generation.samples[0].key

    async def scenario():
        reading = Reading()
        key, _ = await asyncio.gather(broken(), reading.read(s))
        assert key in s.client.aborted
        assert reading.order == IDS
        assert "error inside a stream" in caplog.text

    run(scenario())


def test_an_answer_that_was_given_on_the_spot_cannot_begin_again():
    s = server()

    async def scenario():
        s.client.gate.clear()
        reading = Reading()
        task = asyncio.create_task(reading.read(s))
        while not s.client._running:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        [(_, deliver)] = s.client._running.values()
        key = s.client.submitted[0].rid
        deliver(Output(rid=key, token_ids=IDS[:1]))
        assert len(reading.direct) == 1
        deliver(Output(rid=key, again=True))
        with pytest.raises(EngineRestarting):
            await task

    run(scenario())
