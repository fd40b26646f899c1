"""Connections within bounds, over real sockets: too many, silent ones, ones that do not read."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fakes.server_app import SECONDS

from multilora.server import connections
from multilora.server.connections import (
    AbsoluteTargets,
    bounded_protocol,
    connections_within,
    raise_descriptor_limit,
)

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"


class App:
    """Says its path; `/large` sends 64 MB, `/slow` waits."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/large":
            for _ in range(64):
                await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
            assert (await receive())["type"] == "http.disconnect"
            self.gone.set()
        if scope["path"] == "/slow":
            await asyncio.sleep(0.4)
        await send({"type": "http.response.body", "body": scope["path"].encode()})


@contextlib.asynccontextmanager
async def serving(app, most: int = 100) -> AsyncIterator[int]:
    """The port."""
    config = uvicorn.Config(AbsoluteTargets(app), http=bounded_protocol(most), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    server.config.load()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        task = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = server.force_exit = True
        await task


def run(scenario) -> None:
    async def limited() -> None:
        await asyncio.wait_for(scenario(), SECONDS)

    asyncio.run(limited())


async def ask(port: int, request: bytes = GET) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return answer


def test_one_connection_too_many_is_told():
    async def scenario():
        async with serving(App(), most=3) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            assert b" 503 " in await ask(port)
            held.pop()[1].close()
            while b" 200 " not in await ask(port):
                await asyncio.sleep(0.01)
            for _, writer in held:
                writer.close()

    run(scenario)


HALF_A_SECOND_REQUEST = pytest.param(GET + b"GET", marks=pytest.mark.slow)  # uvicorn waits five seconds for it


@pytest.mark.parametrize("said", [b"", b"GET /a HTTP/1.1\r\nHost", HALF_A_SECOND_REQUEST])
def test_a_silent_connection_is_closed(monkeypatch, said):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)

    async def scenario():
        async with serving(App()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            await reader.read()
            writer.close()

    run(scenario)


def test_a_slow_head_is_not_prolonged_by_its_bytes(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)

    async def scenario():
        async with serving(App()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            closed = asyncio.create_task(reader.read())
            sent = 0
            while not closed.done():
                writer.write(b"G")
                sent += 1
                await asyncio.sleep(0.05)
            assert sent < 20
            writer.close()

    run(scenario)


def test_a_request_under_way_is_not_silent(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)

    async def scenario():
        async with serving(App()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"/slow" in await reader.readuntil(b"0\r\n\r\n")
            writer.close()

    run(scenario)


def test_a_client_that_takes_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.3)

    async def scenario():
        app = App()
        async with serving(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.transport.pause_reading()
            writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            await app.gone.wait()
            writer.transport.abort()

    run(scenario)


def test_a_target_with_scheme_and_host_means_its_path():
    async def scenario():
        async with serving(App()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET http://host:80/v1/models?x=1 HTTP/1.1\r\nHost: host\r\n\r\n")
            assert b"\r\n/v1/models\r\n" in await reader.readuntil(b"0\r\n\r\n")
            writer.close()

    run(scenario)


def test_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        assert raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [connections_within(n) for n in (64, 1024, 65536)] == [32, 768, 65280]


CHUNKED = b"POST /slow HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = b"a" * 1000
FLOODS = {
    "headers": (b"GET /a HTTP/1.1\r\n", b"x-a: " + PIECE + b"\r\n", True),
    "one header": (b"GET /a HTTP/1.1\r\nx-a: ", PIECE, True),
    "the target": (b"GET /", PIECE, True),
    "the second request's headers": (GET + b"GET /a HTTP/1.1\r\n", b"x-a: " + PIECE + b"\r\n", True),
    "a chunk's extension": (CHUNKED + b"1;a=", PIECE, False),
    "trailers": (CHUNKED + b"0\r\n", b"x-a: " + PIECE + b"\r\n", False),
    "one trailer": (CHUNKED + b"0\r\nx-a: ", PIECE, False),
}


@pytest.mark.parametrize(("begin", "again", "told"), FLOODS.values(), ids=FLOODS)
def test_headers_without_end(begin, again, told):
    """The parser would keep them all."""

    async def app(_scope, receive, send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def scenario():
        async with serving(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answers = asyncio.create_task(reader.read())
            writer.write(begin)
            sent = 0
            with contextlib.suppress(ConnectionError):
                while not answers.done():
                    writer.write(again * 8)
                    await writer.drain()
                    await asyncio.sleep(0)
                    sent += 8 * len(again)
            said = b""
            with contextlib.suppress(ConnectionError):
                said = await answers
            assert sent < 64 << 20, "it went on and on"
            if told and said:  # a reset may overtake it
                assert b" 431 " in said
            writer.close()

    run(scenario)


def test_a_long_body_is_no_head():
    """Nor is one that comes after its answer, in pieces of any size."""

    async def scenario():
        async with serving(App()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /first HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (1 << 20))
            for number in range(1 << 10):
                writer.write(b"b" * (1 << 10))
                await writer.drain()
                if number == 0:
                    assert b"/first" in await reader.readuntil(b"0\r\n\r\n")
            writer.write(b"GET /second HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"/second" in await reader.readuntil(b"0\r\n\r\n")
            writer.close()

    run(scenario)


class Refusing:
    """Answers without reading a body."""

    async def __call__(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def test_a_discarded_body_is_read_slowly_and_the_answer_found_behind_it(monkeypatch):
    monkeypatch.setattr(connections, "DISCARD_BYTES", 1 << 20)
    monkeypatch.setattr(connections, "DISCARD_SECONDS", 0.1)

    async def scenario() -> None:
        async with serving(Refusing()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.transport.set_write_buffer_limits(1 << 16)
            start = asyncio.get_running_loop().time()
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (16 << 20))
            for _ in range(16):
                writer.write(b"x" * (1 << 20))
                await writer.drain()
            taken = asyncio.get_running_loop().time() - start
            assert 0.5 < taken < 20  # 1 MB a tenth of a second, but for what buffers hold
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
            while (await reader.readline()).strip():
                pass
            writer.write(GET)  # the connection goes on
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
            writer.close()

    run(scenario)


def test_a_body_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(connections, "DISCARD_BYTES", 1 << 20)
    monkeypatch.setattr(connections, "DISCARD_SECONDS", 0.05)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)

    async def scenario() -> None:
        async with serving(Refusing()) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")

            async def send_on() -> None:
                while True:
                    writer.write(b"10000\r\n" + b"x" * (1 << 16) + b"\r\n")
                    await writer.drain()

            with pytest.raises(ConnectionError):
                await send_on()
            writer.close()

    run(scenario)


def test_a_body_that_is_not_discarded_is_read_at_once(monkeypatch):
    monkeypatch.setattr(connections, "DISCARD_BYTES", 1 << 16)
    monkeypatch.setattr(connections, "DISCARD_SECONDS", 5.0)

    class Reading:
        async def __call__(self, scope, receive, send) -> None:
            more = True
            while more:
                more = (await receive())["more_body"]
            await Refusing()(scope, receive, send)

    async def scenario() -> None:
        async with serving(Reading()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            start = asyncio.get_running_loop().time()
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (16 << 20))
            writer.write(b"x" * (16 << 20))
            await writer.drain()
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
            assert asyncio.get_running_loop().time() - start < 5
            writer.close()

    run(scenario)


def test_a_request_behind_a_discarded_body_is_read_no_faster_than_its_turn(monkeypatch):
    """uvicorn stops reading for it; the end of our pause must not begin that again."""
    monkeypatch.setattr(connections, "DISCARD_BYTES", 1 << 20)
    monkeypatch.setattr(connections, "DISCARD_SECONDS", 0.1)
    body = b"x" * (2 << 20)

    class Slow(Refusing):
        async def __call__(self, scope, receive, send) -> None:
            if scope["path"] == "/slow":
                await asyncio.sleep(1.0)
            await super().__call__(scope, receive, send)

    async def scenario() -> None:
        async with serving(Slow()) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.transport.set_write_buffer_limits(1 << 16)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            writer.write(b"POST /next HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (1 << 30))
            sent, end = 0, asyncio.get_running_loop().time() + 0.8
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    while True:
                        writer.write(b"x" * (1 << 20))
                        await writer.drain()
                        sent += 1 << 20
            assert sent < 32 << 20  # what the buffers of both sockets hold
            writer.transport.abort()

    run(scenario)
