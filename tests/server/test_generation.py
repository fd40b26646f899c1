"""The one road: exactly one ending and one release for every request, whatever happens on the way."""

import asyncio
import threading

import pytest
from fakes.grammars import InProcessGrammars
from fakes.models import FakeEngineClient
from fakes.server_app import SECONDS, LocalServer, run
from fakes.tokenizers import byte_level_tokenizer

from multilora.errors import CannotFit, QueueFull
from multilora.front.effects import CompiledText

HUNG = {"input_ids": [5], "lora_path": "a", "rid": "r", "sampling_params": {"max_new_tokens": 200}}


class Counting(LocalServer):
    """Counts what the registry gave and got back; `check` says whether all is at rest."""

    def __init__(self, **kwargs):
        self.acquired, self.released = [], []
        super().__init__(FakeEngineClient(**kwargs.pop("fake", {})), kwargs.pop("tokenizer", None), **kwargs)
        acquire, release = self.registry.acquire, self.registry.release

        def counted_acquire(name):
            version = acquire(name)
            self.acquired.append(version)
            return version

        def counted_release(version):
            release(version)
            self.released.append(version)

        self.registry.acquire, self.registry.release = counted_acquire, counted_release

    async def at_rest(self):
        for _ in range(5):
            await asyncio.sleep(0)
        assert sorted(self.acquired, key=str) == sorted(self.released, key=str)
        assert self.client._running == {}


def rids(keys):
    """The clients' names of the engine's keys."""
    return sorted(key.rpartition("@")[0] for key in keys)


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_before_the_first_token_aborts(stream):
    s = Counting()
    s.load("a")

    async def scenario():
        s.client.gate.clear()
        call = s.connect("POST", "/generate", HUNG | {"stream": stream})
        await until(lambda: s.client.submitted)
        call.hang_up()
        await call.answer()
        assert rids(s.client.aborted) == ["r"]
        await s.at_rest()

    run(scenario())


def test_hanging_up_in_the_middle_of_a_stream_aborts():
    s = Counting()
    s.load("a")

    async def scenario():
        call = s.connect("POST", "/generate", HUNG | {"stream": True})
        await call.frame()
        s.client.gate.clear()
        call.hang_up()
        await call.answer()
        assert rids(s.client.aborted) == ["r"]
        await s.at_rest()

    run(scenario())


def test_cancelling_the_handler_aborts():
    s = Counting()
    s.load("a")

    async def scenario():
        s.client.gate.clear()
        calls = [s.connect("POST", "/generate", HUNG | {"rid": f"r{i}", "stream": bool(i)}) for i in range(2)]
        await until(lambda: len(s.client.submitted) == 2)
        for call in calls:
            call.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call.task
        assert rids(s.client.aborted) == ["r0", "r1"]
        await s.at_rest()

    run(scenario())


def test_the_engine_dies_while_requests_wait():
    s = Counting()
    s.load("a")

    async def scenario():
        s.client.gate.clear()
        call = s.connect("POST", "/generate", HUNG)
        await until(lambda: s.client.submitted)
        s.client.die()
        answer = await call.answer()
        assert (answer.status, answer.error["code"]) == (503, "EngineDead")
        assert (await s.send("POST", "/generate", HUNG)).status == 503
        assert (await s.send("GET", "/health")).status == 503
        await s.at_rest()

    run(scenario())


def test_the_engine_dies_in_the_middle_of_a_stream():
    s = Counting()
    s.load("a")

    async def scenario():
        call = s.connect("POST", "/generate", HUNG | {"stream": True})
        await call.frame()
        s.client.gate.clear()
        s.client.die()
        *good, error, done, end = (await call.answer()).body.split(b"\n\n")
        assert all(b'"finish_reason":null' in frame for frame in good)
        assert b'"code":"EngineDead"' in error
        assert (done, end) == (b"data: [DONE]", b"")
        await s.at_rest()

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_one_failing_item_aborts_the_others_and_names_itself(stream):
    def refuse(submit):
        return CannotFit("too large") if submit.input_ids == [6] else None

    s = Counting(fake={"refuse": refuse})
    s.load("a")

    async def scenario():
        s.client.gate.clear()
        body = {"input_ids": [[5], [6], [7]], "lora_path": "a", "rid": ["x", "y", "z"], "stream": stream}
        answer = await s.send("POST", "/generate", body)
        assert answer.status == 400
        assert answer.error["message"] == "item 1 of the batch: too large"
        assert answer.error["code"] == "CannotFit"
        assert rids(s.client.aborted) == ["x", "z"]
        await s.at_rest()

    run(scenario())


def test_a_refusal_at_the_door_holds_nothing():
    s = Counting()
    s.load("a")
    body = {"input_ids": [[5], [999]], "lora_path": ["a", "a"]}
    assert s.post("/generate", body).status == 400
    run(s.at_rest())
    assert s.client.submitted == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_503_with_retry_after(stream):
    s = Counting(max_running_requests=1, max_queued_requests=1)

    async def scenario():
        s.client.gate.clear()
        calls = [s.connect("POST", "/generate", {"input_ids": [5], "stream": stream}) for _ in range(2)]
        await until(lambda: len(s.client.submitted) == 2)
        answer = await s.send("POST", "/generate", {"input_ids": [5], "stream": stream})
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.error["code"] == "QueueFull"
        s.client.gate.set()
        assert [(await call.answer()).status for call in calls] == [200, 200]
        assert (await s.send("POST", "/generate", {"input_ids": [5]})).status == 200
        await s.at_rest()

    run(scenario())


def test_the_engines_own_full_queue_is_503_too():
    s = Counting(fake={"refuse": lambda submit: QueueFull("full")})
    answer = s.post("/generate", {"input_ids": [5], "stream": True})
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


def test_a_request_larger_than_the_queue_is_400():
    s = Counting(max_running_requests=1, max_queued_requests=1)
    assert s.post("/generate", {"input_ids": [[5]] * 3}).status == 400


def test_a_rid_in_use_is_refused_and_free_again_afterwards():
    s = Counting()
    s.load("a")

    async def scenario():
        s.client.gate.clear()
        call = s.connect("POST", "/generate", HUNG)
        await until(lambda: s.client.submitted)
        answer = await s.send("POST", "/generate", HUNG)
        assert (answer.status, answer.error["param"]) == (400, "rid")
        s.client.gate.set()
        assert (await call.answer()).status == 200
        assert (await s.send("POST", "/generate", HUNG)).status == 200
        keys = [m.rid for m in s.client.submitted]
        assert rids(keys) == ["r", "r"]
        assert keys[0] != keys[1]  # so that nothing of the first can reach the second

    run(scenario())


def test_abort_by_rid_ends_all_of_its_sequences_and_no_other():
    s = Counting()
    s.load("a")

    async def scenario():
        s.client.gate.clear()
        batch = s.connect("POST", "/generate", {"input_ids": [[5], [6]], "rid": "r", "lora_path": "a"})
        other = s.connect("POST", "/generate", {"input_ids": [5], "rid": "r2"})
        await until(lambda: len(s.client.submitted) == 3)
        assert (await s.send("POST", "/abort_request", {"rid": "r", "abort_message": "enough"})).status == 200
        answer = await batch.answer()
        assert answer.status == 200
        reasons = [item["meta_info"]["finish_reason"] for item in answer.json()]
        assert reasons == [{"type": "abort", "message": "enough"}] * 2
        assert not other.task.done()
        assert (await s.send("POST", "/abort_request", {"abort_all": True})).status == 200
        assert (await other.answer()).json()["meta_info"]["finish_reason"]["type"] == "abort"
        await s.at_rest()

    run(scenario())


def test_an_abort_while_the_grammar_compiles_is_not_lost(monkeypatch):
    s = Counting(tokenizer=byte_level_tokenizer())
    compiling, go_on = threading.Event(), threading.Event()

    async def compile_slowly(self, setup, field, source):
        compiling.set()
        assert await asyncio.to_thread(go_on.wait, SECONDS)
        return CompiledText("a", "{}")

    monkeypatch.setattr(InProcessGrammars, "compile", compile_slowly)

    async def scenario():
        s.client.gate.clear()
        call = s.connect("POST", "/generate", {"input_ids": [5], "rid": "r", "sampling_params": {"regex": "a"}})
        assert await asyncio.to_thread(compiling.wait, SECONDS)
        await s.send("POST", "/abort_request", {"rid": "r"})
        go_on.set()
        assert (await call.answer()).json()["meta_info"]["finish_reason"]["type"] == "abort"
        await s.at_rest()

    run(scenario())
