"""Bodies within bounds: their size, their time, how many values they have, and who waits for whom."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer
from starlette.requests import Request
from waiting import wait_for

from multilora.errors import PayloadTooLarge, QueueFull, RequestTimeout
from multilora.server import request_body
from multilora.server.body_values import body_values
from multilora.server.request_body import BODIES_AT_ONCE, INLINE_BYTES, Bodies

CHAT = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
BODIES = {
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 1}},
    "/v1/completions": {"model": "base", "prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": CHAT,
    "/tokenize": {"prompt": "a"},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "/a"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


def server_of(tokenizer, **options) -> LocalServer:
    return LocalServer(FakeEngineClient(vocab_size=tokenizer.vocab_size), tokenizer, **options)


def request_of(*pieces: bytes, seconds: float = 0.0, **headers: str) -> Request:
    """Whose body comes in pieces, each after so many seconds."""
    left = list(pieces)

    async def receive():
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    head = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": head}, receive)


@pytest.mark.parametrize("path", BODIES)
def test_a_longer_body_is_refused_in_the_errors_shape(tokenizer, path):
    server = server_of(tokenizer, max_body_bytes=1000)
    assert server.post(path, BODIES[path]).status == 200
    for headers in ({}, {"content-length": "1001"}, {"content-length": "9" * 5000}):
        body = BODIES[path] | ({} if headers else {"user": "x" * 1000})
        answer = server.post(path, body, **headers)
        assert (answer.status, answer.error["code"]) == (413, "PayloadTooLarge")
        assert "over 1000 bytes (--max-body-bytes)" in answer.error["message"]


def test_the_native_adapter_routes_answer_in_their_own_shape(tokenizer):
    answer = server_of(tokenizer, max_body_bytes=100).post("/load_lora_adapter", {"lora_name": "a" * 100})
    assert answer.status == 413
    assert "over 100 bytes" in answer.json()["error_message"]


def test_reading_stops_where_it_is_too_long():
    left = []

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            left.append(1)
            yield b"x" * 10

    request = request_of()
    request.stream = pieces
    with pytest.raises(PayloadTooLarge):
        run(Bodies(25).read(request))
    assert len(left) == 3


def test_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr(request_body, "IDLE_SECONDS", 0.05)
    with pytest.raises(RequestTimeout, match="1 bytes were read") as e:
        run(Bodies(100).read(_stalls(b"x")))
    assert e.value.status == 408
    assert run(Bodies(100).read(request_of(b"a", b"b", b"c", seconds=0.03))) == b"abc"
    monkeypatch.setattr(request_body, "TOTAL_SECONDS", 0.06)
    with pytest.raises(RequestTimeout):
        run(Bodies(100).read(request_of(*[b"a"] * 9, seconds=0.03)))


def _stalls(first: bytes) -> Request:
    pieces = [first]

    async def receive():
        if not pieces:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": pieces.pop(), "more_body": True}

    return Request({"type": "http", "headers": []}, receive)


def test_bodies_together_are_bounded_and_make_room_again():
    bodies = Bodies(10)

    async def scenario():
        reading = [asyncio.create_task(bodies.read(_stalls(b"x" * 10))) for _ in range(BODIES_AT_ONCE)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await bodies.read(request_of(b"x"))
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        assert await bodies.read(request_of(b"x")) == b"x"

    run(scenario())


@pytest.mark.parametrize("where", ["inline", "thread", "process"])
def test_large_and_small_bodies_are_read_alike(tokenizer, where):
    server, size = server_of(tokenizer), 10 if where == "inline" else 2 * INLINE_BYTES
    if where == "process":
        server.app.state.bodies.process.start()
        wait_for(server.app.state.bodies.process.is_ready)
    padding = {"user": "x" * size}
    assert server.post("/v1/chat/completions", CHAT | padding).status == 200
    for change, said in (
        ({"messages": [1, 2]}, "messages.0"),
        ({"messages": []}, "messages"),
        ({"temperature": "hot"}, "temperature: 'hot'"),
        ({"n": 0}, "n = 0"),
    ):
        answer = server.post("/v1/chat/completions", CHAT | padding | change)
        assert answer.status == 400
        assert said in answer.error["message"]
    text = json.dumps(CHAT | padding)
    for bad in (text[:-1], text.replace('"a"', "NaN"), text.replace('"a"', "[" * 5000), text.replace('"a"', "1e999")):
        answer = server.post("/v1/chat/completions", bad.encode())
        assert answer.status == 400
        assert "not valid JSON" in answer.error["message"]
    assert server.post("/v1/chat/completions", text.encode(), **{"content-type": "text/plain"}).status == 400


def test_a_large_body_is_decoded_on_another_thread_and_then_in_another_process(tokenizer, monkeypatch):
    server, threads = server_of(tokenizer), set()
    monkeypatch.setattr(
        request_body,
        "body_values",
        lambda body, kind: threads.add(threading.current_thread()) or body_values(body, kind),
    )
    large = CHAT | {"user": "x" * 2 * INLINE_BYTES}
    assert server.post("/v1/chat/completions", large).status == 200
    assert threads and threading.main_thread() not in threads
    server.app.state.bodies.process.start()
    wait_for(server.app.state.bodies.process.is_ready)
    threads.clear()
    assert server.post("/v1/chat/completions", large).status == 200
    assert not threads


def test_a_long_list_of_wrong_entries_costs_no_more_than_its_first(tokenizer):
    """All of its errors together took 6 s."""
    server = server_of(tokenizer)
    for path, field in (("/v1/chat/completions", "messages"), ("/generate", "text"), ("/v1/completions", "prompt")):
        start = time.process_time()
        answer = server.post(path, BODIES[path] | {field: [1.5] * 500_000})
        assert answer.status == 400
        assert time.process_time() - start < 2
        assert len(answer.body) < 3000


def test_errors_do_not_repeat_what_was_sent(tokenizer):
    server = server_of(tokenizer)
    sampling = [{"stop": {"a": "x" * 10**6}}, {"x" * 10**6: 1}, {"temperature": "x" * 10**6}, {"regex": "(" * 10**5}]
    for params in sampling:
        answer = server.post("/generate", {"text": "a", "sampling_params": params})
        assert answer.status == 400
        assert len(answer.body) < 3000
    assert len(server.post("/v1/completions", {"model": "x" * 10**6, "prompt": "a"}).body) < 3000
