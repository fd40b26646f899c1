"""Who reads a stream slowly gets what has come meanwhile in one piece, and nothing is lost."""

import asyncio
import json

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

from multilora.errors import CannotFit
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
