"""Who reads a stream slowly gets what has come meanwhile in one piece, and nothing is lost. What an engine that has
ended had said is void for who has not read it, and an error for who has."""

import asyncio
import json

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

from multilora.engine.messages import Finished, Output
from multilora.errors import CannotFit, EngineRestarting
from multilora.front.generation import Job
from multilora.params import SamplingParams
from multilora.server import native

COUNT = 200
IDS = list(range(3, 90)) * 10


def server_of(**options) -> LocalServer:
    client = FakeEngineClient(context_length=1024, answer=lambda _: IDS[:COUNT], **options)
    return LocalServer(client, byte_level_tokenizer())


async def until(condition) -> None:
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError


def test_a_backlog_is_one_delta_of_each_sample():
    s = server_of()

    async def scenario():
        sampling = SamplingParams(max_new_tokens=COUNT, n=2)
        generation = await s.driver.generate([Job(prompt=[5], sampling=sampling, return_logprob=True)])
        events = generation.events()
        deltas = [await anext(events)]
        await until(lambda: not s.client._running)
        deltas += [event async for event in events]
        assert len(deltas) <= 4
        for sample in generation.samples:
            own = [delta for of, delta in deltas if of is sample]
            assert [t for d in own for t in d.token_ids] == sample.stream.token_ids == IDS[:COUNT]
            assert "".join(d.text for d in own) == sample.stream.text
            assert [one for d in own for one in d.logprobs] == sample.stream.logprobs
            assert [d.finished is not None for d in own] == [False] * (len(own) - 1) + [True]

    run(scenario())


def test_an_error_comes_after_what_was_before_it():
    s = server_of(refuse=lambda submit: CannotFit("x") if submit.sampling.sampling_seed == 1 else None)

    async def scenario():
        jobs = [Job(prompt=[5], sampling=SamplingParams(max_new_tokens=3, sampling_seed=seed)) for seed in (0, 1)]
        s.client.gate.clear()
        generation = await s.driver.generate(jobs)
        events = generation.events()
        with pytest.raises(CannotFit):
            await anext(events)
        assert generation.samples[0].key in s.client.aborted

    run(scenario())


def test_who_does_not_read_holds_no_adapter_once_the_engine_has_finished():
    s = server_of()
    s.load("a")

    async def scenario():
        sampling = SamplingParams(max_new_tokens=COUNT)
        generation = await s.driver.generate([Job(prompt=[5], sampling=sampling, adapters=(("a", 1.0),))])
        unload = asyncio.create_task(s.driver.change(s.driver.front.adapters.unload("a")))
        await until(lambda: not s.client._running)
        await asyncio.wait_for(unload, 5)
        assert s.registry.loaded() == {} and s.driver.front.in_flight == 1
        (sample,) = await generation.results()
        assert sample.stream.token_ids == IDS[:COUNT] and sample.label.lora_version == 1
        assert 'adapter_name="a"' not in (await s.send("GET", "/metrics")).text

    run(scenario())


class Interrupted:
    """A generation of two samples whose outputs the test gives, also those of a second engine."""

    def __init__(self, s: LocalServer):
        self.s = s

    async def begin(self):
        self.s.client.gate.clear()
        sampling = SamplingParams(max_new_tokens=3, n=2, stop=["x"])
        self.generation = await self.s.driver.generate([Job(prompt=[5], sampling=sampling)])
        self.keys = [sample.key for sample in self.generation.samples]
        self.deliver = self.generation._outputs.put

    def say(self, index, *tokens, **fields):
        self.deliver(Output(rid=self.keys[index], token_ids=list(tokens), **fields))

    def end(self):
        for index in (0, 1):
            self.say(index, 70, 71, finished=Finished(type="length"))


def test_an_answer_that_nobody_has_seen_begins_again():
    async def scenario():
        i = Interrupted(server_of())
        await i.begin()
        i.say(0, 80)
        i.say(0, again=True)
        i.say(1, 81)
        answers = asyncio.ensure_future(i.generation.results())
        await asyncio.sleep(0.01)
        i.say(1, again=True)
        i.end()
        assert [sample.stream.token_ids for sample in await answers] == [[70, 71]] * 2

    run(scenario())


@pytest.mark.parametrize("count", [0, 70])
def test_a_stream_whose_client_has_seen_nothing_begins_again(count):
    """Also where many outputs wait and are taken as one."""

    async def scenario():
        i = Interrupted(server_of())
        await i.begin()
        if count:
            for _ in range(count):
                i.say(0, 80)
            i.say(0, again=True)
        i.end()
        deltas = [delta async for _, delta in i.generation.events()]
        assert [delta.token_ids for delta in deltas] == [[70, 71]] * 2

    run(scenario())


def test_a_stream_whose_client_has_seen_some_ends_with_an_error():
    async def scenario():
        i = Interrupted(server_of())
        await i.begin()
        events = i.generation.events()
        i.say(0, 80)
        assert (await anext(events))[1].token_ids == [80]
        i.say(0, again=True)
        with pytest.raises(EngineRestarting):
            await anext(events)
        assert i.s.client.aborted == i.keys and i.s.driver.front.in_flight == 0

    run(scenario())


def test_large_cumulative_frames_become_rare(monkeypatch):
    """One for each token made a stream quadratic in its answer."""
    monkeypatch.setattr(native, "LARGE_FRAME", 100)
    s = server_of()
    s.client.answer = lambda _: IDS[:800]
    body = {"input_ids": [5], "stream": True, "sampling_params": {"max_new_tokens": 800}}
    answer = s.post("/generate", body)
    counts = [frame["meta_info"]["completion_tokens"] for frame in answer.frames]
    assert counts == sorted(counts)
    assert len(counts) < 400
    assert answer.frames[-1]["output_ids"] == IDS[:800]
    assert len(answer.body) < 70 * len(json.dumps(answer.frames[-1]))
