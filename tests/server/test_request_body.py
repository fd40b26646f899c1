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

from multilora.errors import BadRequest, PayloadTooLarge, QueueFull, RequestTimeout
from multilora.server import request_body
from multilora.server.request_body import BODIES_AT_ONCE, INLINE_BYTES, Bodies, check_values

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


@pytest.mark.parametrize(
    "body",
    [b"[" + b"[1]," * 200_000 + b"1]", b'{"a":[' + b"{}," * 150_000 + b"1]}", b"[" + b"1," * 2_500_000 + b"1]"],
)
def test_too_many_values(body):
    with pytest.raises(BadRequest, match="the body has over"):
        check_values(body)


def test_what_is_in_texts_does_not_count():
    check_values(json.dumps({"text": '[{,"\\' * 1_000_000, "more": ["a,[b"] * 1000}).encode())


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 1000])
def test_pieces_are_counted_as_the_whole_is(monkeypatch, at_once):
    """Whatever stands where one ends: an escape, a text, a quote in one."""
    monkeypatch.setattr(request_body, "_SORTED_AT_ONCE", at_once)
    values = ["a", '"', "\\", '\\"', '[,{"', "\\\\", ""]
    for number in range(200):
        chosen = [values[(number * 7**i >> 2) % len(values)] for i in range(number % 9)]
        body = json.dumps({"a": chosen, "b": {}}).encode()
        assert b"".join(request_body._pieces(body)) == body
        for limit, real in (("MAX_CONTAINERS", 3), ("MAX_TEXTS", len(chosen) + 2), ("MAX_VALUES", body.count(b", "))):
            with monkeypatch.context() as limits:
                for name in ("MAX_CONTAINERS", "MAX_TEXTS", "MAX_VALUES"):
                    limits.setattr(request_body, name, 1 << 20)
                limits.setattr(request_body, limit, real)
                check_values(body)
                limits.setattr(request_body, limit, real - 1)
                with pytest.raises(BadRequest, match="the body has over"):
                    check_values(body)


def test_texts_are_counted_without_quotes_in_them():
    check_values(json.dumps(["a"] * 400_000 + ['"' * 2_000_000]).encode())
    with pytest.raises(BadRequest, match="500000 texts"):
        check_values(json.dumps({"a": dict.fromkeys(map(str, range(500_001)), 1)}).encode())


def test_a_body_of_quotes_is_not_taken_apart():
    with pytest.raises(BadRequest, match="texts"):
        check_values(b"[" + b'"",' * 2_500_000 + b'""]')


@pytest.mark.parametrize("size", [10, 2 * INLINE_BYTES])
def test_large_and_small_bodies_are_read_alike(tokenizer, size):
    server = server_of(tokenizer)
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


def test_a_large_body_is_decoded_on_another_thread(tokenizer, monkeypatch):
    server, threads = server_of(tokenizer), set()
    check = check_values
    monkeypatch.setattr(
        request_body, "check_values", lambda body: threads.add(threading.current_thread()) or check(body)
    )
    server.post("/generate", BODIES["/generate"] | {"rid": "x" * 2 * INLINE_BYTES})
    assert threads and threading.main_thread() not in threads


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
