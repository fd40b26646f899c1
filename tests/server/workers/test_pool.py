"""Two front processes and a supervisor: what a client is told by one of them holds for the other at once.

Covers `workers/app.py`, `workers/events.py`, `workers/relay.py`, `workers/worker.py`, `one_process.py` too.
"""

import asyncio
import logging

import pytest
from fakes.front_workers import Workers
from fakes.models import FakeEngineClient
from fakes.server_app import run
from fakes.tokenizers import byte_level_tokenizer
from keys import key_of, write_keys

from multilora.drivers.workers.process import WorkerProcess
from multilora.errors import EngineDead
from multilora.server.workers import pool as pool_module

TOKENIZER = byte_level_tokenizer()
GREEDY = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
BODY = {"input_ids": [5, 6], "sampling_params": GREEDY}
BOTH = (0, 1)


@pytest.fixture
def start(monkeypatch):
    def make(client=None, **options):
        return Workers(monkeypatch, client or FakeEngineClient(vocab_size=320), TOKENIZER, **options)

    return make


def bearer(name):
    return {"authorization": f"Bearer {key_of(name)}"}


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def generate(server, place, headers=None, **more):
    return await server.on(place, "POST", "/generate", BODY | more, **(headers or {}))


async def stream(server, place, **more):
    """A stream that has been taken in by the engine and is held up there."""
    server.client.gate.clear()
    before = len(server.client.submitted)
    connection = server.connect_on(place, "POST", "/generate", BODY | {"stream": True} | more)
    await until(lambda: len(server.client.submitted) > before)
    return connection


def test_every_process_gives_the_same_answers(start):
    bodies = {
        "/generate": {"text": "the cat", "sampling_params": GREEDY},
        "/v1/completions": {"model": "base", "prompt": "the cat", "max_tokens": 4, "temperature": 0, "logprobs": 1},
        "/v1/chat/completions": {
            "model": "base",
            "messages": [{"role": "user", "content": "the cat"}],
            "max_tokens": 4,
        },
        "/v1/messages": {"model": "base", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4},
        "/tokenize": {"prompt": "the cat"},
        "/v1/responses": {"model": "base", "input": "the cat", "max_output_tokens": 4},
    }

    def stable(answer):
        found = answer.json()
        for name in ("id", "created", "created_at"):
            found.pop(name, None)
        found.get("meta_info", {}).pop("e2e_latency", None)
        found.get("meta_info", {}).pop("id", None)
        for item in found.get("output", ()):
            item.pop("id", None)
        return found

    async def scenario():
        async with start() as server:
            for path, body in bodies.items():
                answers = [await server.send("POST", path, body)]
                answers += [await server.on(place, "POST", path, body) for place in BOTH]
                assert [answer.status for answer in answers] == [200] * 3, (path, answers[1].text)
                first, *others = map(stable, answers)
                assert others == [first, first], path
            streamed = [await generate(server, place, stream=True) for place in BOTH]
            assert [answer.frames[-1]["output_ids"] for answer in streamed] == [
                streamed[0].frames[-1]["output_ids"]
            ] * 2

    run(scenario())


def test_what_generates_is_answered_by_the_worker_and_everything_else_by_the_supervisor(start):
    async def scenario():
        async with start() as server:
            app = server.face(0)._server.config.app.app.app

            def owned(*paths):
                scope = {"type": "http", "headers": []}
                return {path for path in paths if app.owns(scope | {"method": "POST", "path": path})}

            own = {"/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize"}
            assert owned(*own, "/load_lora_adapter", "/v1/responses", "/abort_request", "/nowhere") == own
            assert app.owns({"type": "http", "method": "GET", "path": "/health", "headers": []}) is False
            here, there = await server.send("GET", "/openapi.json"), await server.on(0, "GET", "/openapi.json")
            assert here.body == there.body and here.status == 200
            for method, path in (("GET", "/health"), ("HEAD", "/health"), ("GET", "/ready"), ("GET", "/v1/models")):
                assert (await server.on(1, method, path)).status == 200
            assert (await server.on(0, "GET", "/nowhere")).error["message"] == "no route GET /nowhere"
            assert (await server.on(0, "GET", "/generate")).status == 405

    run(scenario())


def test_an_adapter_that_one_loads_is_the_others_at_once_and_gone_at_once(start):
    async def scenario():
        async with start() as server:
            for number in range(8):
                body = {"lora_name": "a", "lora_path": f"/adapters/{number}"}
                loaded = await server.on(number % 2, "POST", "/load_lora_adapter", body)
                assert loaded.json()["success"], loaded.text
                versions = []
                for place in BOTH:
                    answer = await generate(server, place, lora_path="a")
                    assert answer.status == 200, answer.text
                    versions.append(server.client.submitted[-1].adapters[0][0])
                assert versions == [number + 1] * 2
                gone = await server.on((number + 1) % 2, "POST", "/unload_lora_adapter", {"lora_name": "a"})
                assert gone.json()["success"]
                for place in BOTH:
                    assert (await generate(server, place, lora_path="a")).error["code"] == "UnknownAdapter"

    run(scenario())


def test_a_replaced_adapter_and_a_composition(start):
    async def scenario():
        async with start(lora_load_mode="upsert") as server:
            for name in ("a", "b", "a"):
                body = {"lora_name": name, "lora_path": f"/adapters/{name}"}
                assert (await server.on(0, "POST", "/load_lora_adapter", body)).status == 200
            parts = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]
            body = {"lora_name": "mix", "parts": parts, "lora_path": parts}
            composed = await server.on(1, "POST", "/load_lora_adapter", {"lora_name": "mix", "lora_path": parts})
            for place in BOTH:
                answer = await generate(server, place, lora_path="a")
                assert answer.json()["meta_info"]["lora_version"] == 3, answer.text
                mixed = await generate(server, place, lora_path="mix" if composed.status == 200 else body["parts"])
                assert mixed.status == 200, mixed.text
                assert sorted(server.client.submitted[-1].adapters) == [(2, 0.5), (3, 0.5)]
            labelled = await server.on(0, "POST", "/update_weight_version", {"new_version": "step-7"})
            assert labelled.status == 200
            for place in BOTH:
                assert (await generate(server, place)).json()["meta_info"]["weight_version"] == "step-7"

    run(scenario())


def test_requests_go_on_with_the_new_version_and_say_so(start):
    async def scenario():
        async with start(lora_load_mode="update") as server:
            body = {"lora_name": "a", "lora_path": "/adapters/a"}
            await server.on(0, "POST", "/load_lora_adapter", body)
            running = await stream(server, 1, lora_path="a")
            assert (await server.on(0, "POST", "/load_lora_adapter", body)).json()["success"]
            server.client.gate.set()
            last = (await running.answer()).frames[-1]
            assert last["meta_info"]["lora_version"] == 2, last
            await until(lambda: server.client.unloaded == [1])

    run(scenario())


def test_any_process_aborts_what_another_one_serves(start):
    async def scenario():
        async with start() as server:
            one = await stream(server, 0, rid="mine")
            two = await stream(server, 1, rid="other")
            taken = await generate(server, 1, rid="mine")
            assert "in use" in taken.error["message"]
            await server.on(1, "POST", "/abort_request", {"rid": "mine"})
            assert (await one.answer()).frames[-1]["meta_info"]["finish_reason"]["type"] == "abort"
            await server.on(0, "POST", "/abort_request", {"abort_all": True})
            assert (await two.answer()).frames[-1]["meta_info"]["finish_reason"]["type"] == "abort"
            server.client.gate.set()
            assert (await generate(server, 0, rid="mine")).status == 200
            await until(lambda: server.driver.front.in_flight == 0)

    run(scenario())


def test_a_client_that_hangs_up_ends_its_request_everywhere(start):
    async def scenario():
        async with start() as server:
            running = await stream(server, 0)
            running.hang_up()
            await until(lambda: server.client.aborted)
            await until(lambda: server.driver.front.in_flight == 0)
            waiting = asyncio.Event()

            async def never(version, path, pinned):
                waiting.set()
                await asyncio.Event().wait()

            server.client.load_adapter = never
            load = server.connect_on(1, "POST", "/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"})
            await waiting.wait()
            load.hang_up()
            await until(lambda: not server.registry.is_loading("a"))

    run(scenario())


def test_metrics_are_the_sum_whoever_is_asked(start):
    async def scenario():
        async with start() as server:
            await server.load_from("a", "/adapters/a")
            for place, count in ((0, 2), (1, 3)):
                for _ in range(count):
                    assert (await generate(server, place, lora_path="a")).status == 200
            for place in BOTH:
                text = (await server.on(place, "GET", "/metrics")).text
                lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
                assert lines['multilora:requests_total{adapter_name="a",finish_reason="length"}'] == "5.0"
                assert lines['multilora:requests_started_total{adapter_name="a"}'] == "5.0"
                assert lines['multilora:generation_tokens_total{adapter_name="a"}'] == "20.0"
                assert lines['multilora:time_to_first_token_seconds_count{adapter_name="a"}'] == "5.0"
                assert lines['http_requests_total{handler="/generate",method="POST",status="2xx"}'] == "5.0"
                assert lines['vllm:generation_tokens_total{engine="0",model_name="base"}'] == "20.0"
                assert lines['vllm:inter_token_latency_seconds_count{engine="0",model_name="base"}'] == "15.0"
            await server.on(0, "POST", "/unload_lora_adapter", {"lora_name": "a"})
            assert 'adapter_name="a"' not in (await server.on(1, "GET", "/metrics")).text

    run(scenario())


def test_what_a_process_logs_is_in_the_consoles_log(start):
    async def scenario():
        async with start() as server:
            for place in BOTH:
                record = logging.LogRecord("x", logging.INFO, "x", 1, "said by %d", (place,), None)
                server.face(place)._events._lines.emit(record)
            lines = (await server.on(0, "GET", "/console/log")).json()["lines"]
            found = [line["message"] for line in lines if "said by" in line["message"]]
            assert found[-2:] == ["front-1: said by 0", "front-2: said by 1"]
            again = (await server.on(1, "GET", f"/console/log?after={lines[-1]['number']}")).json()["lines"]
            assert all("said by" not in line["message"] for line in again)

    run(scenario())


LIMITED = """
[keys.few]
tenant = "acme"
load = ["*"]
requests_per_minute = 3

[keys.one]
tenant = "acme"
concurrency = 1

[keys.ops]
admin = true
"""


def test_limits_are_those_of_the_server_not_of_each_process(start, tmp_path):
    async def scenario():
        async with start(auth_file=write_keys(tmp_path / "keys.toml", LIMITED)) as server:
            statuses = [(await generate(server, n % 2, bearer("few"))).status for n in range(5)]
            assert statuses == [200, 200, 200, 429, 429]
            over = await server.on(1, "GET", "/v1/models", **bearer("few"))
            assert over.status == 429
            refused = await generate(server, 0, bearer("few"))
            assert int(refused.headers["retry-after"]) >= 10 and refused.error["code"] == "rate_limit_exceeded"
            server.client.gate.clear()
            running = server.connect_on(0, "POST", "/generate", BODY | {"stream": True}, **bearer("one"))
            await until(lambda: server.driver.front.in_flight == 1)
            assert (await generate(server, 1, bearer("one"))).status == 429
            server.client.gate.set()
            assert (await running.answer()).status == 200
            await until(lambda: server.driver.front.in_flight == 0)
            assert (await generate(server, 1, bearer("one"))).status == 200

    run(scenario())


def test_keys_that_are_read_again_count_everywhere(start, tmp_path):
    async def scenario():
        path = write_keys(tmp_path / "keys.toml", LIMITED)
        async with start(auth_file=path) as server:
            for place in BOTH:
                assert (await generate(server, place)).status == 401
                assert (await generate(server, place, bearer("late"))).status == 401
            write_keys(tmp_path / "keys.toml", LIMITED.replace("[keys.few]", "[keys.late]"))
            server.app.state.keys.reload()
            server.pool.reload_keys()
            for place in BOTH:
                await until_status(server, place, "late", 200)
                assert (await generate(server, place, bearer("few"))).status == 401
                assert (await server.on(place, "GET", "/v1/models", **bearer("few"))).status == 401

    async def until_status(server, place, key, status):
        while (await generate(server, place, bearer(key))).status != status:
            await asyncio.sleep(0.001)

    run(scenario())


def test_the_queue_is_one(start):
    async def scenario():
        async with start(max_running_requests=1, max_queued_requests=1) as server:
            streams = [await stream(server, place) for place in BOTH]
            for place in BOTH:
                full = await generate(server, place)
                assert full.status == 503 and full.error["code"] == "QueueFull" and "retry-after" in full.headers
            load = (await server.on(0, "GET", "/load")).json()
            assert load == {"server_load": 2}
            server.client.gate.set()
            assert [(await running.answer()).status for running in streams] == [200, 200]

    run(scenario())


def test_a_process_that_dies_takes_only_its_own_requests_along_and_comes_back(start):
    async def scenario():
        async with start() as server:
            await server.load_from("a", "/adapters/a")
            lost = await stream(server, 0, lora_path="a", rid="lost")
            kept = await stream(server, 1, lora_path="a", rid="kept")
            before = server.pool._workers[0]
            before._process.kill()
            await until(lambda: server.client.aborted)
            assert [key.partition("@")[0] for key in server.client.aborted] == ["lost"]
            server.client.gate.set()
            assert (await kept.answer()).status == 200
            lost.hang_up()  # its connection has ended with the process
            await until(lambda: server.pool._workers[0] is not before)
            assert server.pool.restarts == 1
            assert (await generate(server, 0, lora_path="a")).status == 200
            assert (await server.on(0, "POST", "/unload_lora_adapter", {"lora_name": "a"})).json()["success"]

    run(scenario())


@pytest.mark.slow
def test_a_process_that_does_not_take_over_new_names_is_ended(start, monkeypatch):
    monkeypatch.setattr(pool_module, "SETTLE_SECONDS", 0.05)

    async def scenario():
        async with start() as server:
            hung = server.pool._workers[1]
            server.face(1)._link._names.put = lambda change: None
            body = {"lora_name": "a", "lora_path": "/adapters/a"}
            assert (await server.on(0, "POST", "/load_lora_adapter", body)).json()["success"]
            await until(lambda: server.pool._workers[1] is not hung)
            assert (await generate(server, 1, lora_path="a")).status == 200

    run(scenario())


@pytest.mark.slow
def test_a_process_that_says_nothing_any_more_is_ended(start, monkeypatch):
    async def scenario():
        async with start() as server:
            silences = [worker._silence for worker in server.pool._workers.values()]
            began = [silence._heard_at for silence in silences]
            await until(lambda: all(one._heard_at > then for one, then in zip(silences, began, strict=True)))
            lost = await stream(server, 0, rid="lost")
            hung = server.pool._workers[0]
            monkeypatch.setattr(hung._silence, "too_long", lambda: True)
            await until(lambda: server.client.aborted)
            await until(lambda: server.pool._workers[0] is not hung)
            lost.hang_up()  # its connection has ended with the process
            server.client.gate.set()
            assert (await generate(server, 0)).status == 200
            assert server.pool.restarts == 1

    run(scenario())


def test_what_is_left_after_the_drain_gets_its_ending(start):
    async def scenario():
        async with start() as server:
            streams = [await stream(server, place) for place in BOTH]
            server.pool.drain()
            server.driver.stop()
            for running in streams:
                ends = (await running.answer()).text
                assert "the server is being stopped" in ends
            assert (await generate(server, 0)).error["code"] == "ServerStopping"

    run(scenario())


def test_a_process_that_cannot_start_is_said_at_the_start(start, monkeypatch):
    def broken(config):
        raise EngineDead("no tokenizer today")

    async def scenario():
        server = start()
        monkeypatch.setattr("multilora.server.workers.worker.load_text", broken)
        with pytest.raises(EngineDead, match=r"front-[12] ended with code 1 before it served"):
            await server.__aenter__()
        assert all(worker.ended.done() for worker in server.pool._workers.values())

    run(scenario())


def test_answers_wait_until_all_know(start, monkeypatch):
    """Were it not so, the worker that is slow to read a tokenizer would not know the name."""

    async def scenario():
        async with start() as server:
            names = server.face(1)._link._names
            put, held = names.put, []
            names.put = held.append
            body = {"lora_name": "a", "lora_path": "/adapters/a"}
            load = server.connect_on(0, "POST", "/load_lora_adapter", body)
            await until(lambda: held)
            await asyncio.sleep(0.05)
            assert not load.task.done()
            for change in held:
                put(change)
            names.put = put
            assert (await load.answer()).json()["success"]
            assert (await generate(server, 1, lora_path="a")).status == 200

    run(scenario())


def test_a_worker_is_named_in_what_it_is_ended_for(caplog):
    class Process:
        pid = 1 << 30

    worker = WorkerProcess.__new__(WorkerProcess)
    worker.name, worker._process = "front-2", Process()
    worker.kill("it hangs")
    assert "front-2 is ended: it hangs" in caplog.text
