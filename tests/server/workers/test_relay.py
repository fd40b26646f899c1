"""A request handed on over a Unix socket: what its client gets, whatever comes first. Covers `workers/relay.py`."""

import asyncio
import socket

import pytest

from multilora.server.uvicorn_setup import event_loop
from multilora.server.workers import relay
from multilora.server.workers.relay import Forwarder, RelayServer

PIECE = {"type": "http.request", "body": b"piece", "more_body": True}
LAST = {"type": "http.request", "body": b"", "more_body": False}
SCOPE = {
    "type": "http",
    "method": "GET",
    "path": "/health",
    "raw_path": b"/health",
    "query_string": b"",
    "headers": [(b"host", b"x")],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 2),
    "scheme": "http",
    "http_version": "1.1",
}


async def early(scope, receive, send):
    """Answers without a look at the body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"well", "more_body": False})


async def echo(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def nothing(*_):
    pass


class Client:
    """One request through worker and supervisor. pieces: of its body, after so many seconds each; each message of the
    answer takes it twice as long."""

    def __init__(self, pieces, seconds=0.0):
        self.pieces = list(pieces)
        self.seconds = seconds
        self.sent = []
        self.hung_up = asyncio.Event()

    async def receive(self):
        if not self.pieces:
            await self.hung_up.wait()
            return {"type": "http.disconnect"}
        await asyncio.sleep(self.seconds)
        return self.pieces.pop(0)

    async def send(self, message):
        self.sent.append(message)
        await asyncio.sleep(2 * self.seconds)

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def body(self):
        return b"".join(message["body"] for message in self.sent[1:])


async def asked(app, path, *clients):
    server = RelayServer(app, nothing, nothing)
    await server.start(path)
    try:
        await asyncio.gather(*(Forwarder(str(path))(SCOPE, client.receive, client.send) for client in clients))
        async with asyncio.timeout(10):
            while server._requests:
                await asyncio.sleep(0.01)
    finally:
        await server.close()


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_an_answer_that_is_there_before_the_body_is_not_lost(tmp_path, seconds):
    async def scene():
        clients = [Client([PIECE, PIECE, LAST], seconds) for _ in range(50)]
        await asked(early, tmp_path / "s", *clients)
        assert [(client.status, client.body) for client in clients] == [(200, b"well")] * 50

    asyncio.run(scene())


def test_the_answer_of_an_application_that_raises_is_not_lost_either(tmp_path):
    async def raising(*call):
        await early(*call)
        raise RuntimeError("after its answer")

    async def scene():
        client = Client([PIECE, PIECE, LAST], 0.02)
        await asked(raising, tmp_path / "s", client)
        assert (client.status, client.body) == (200, b"well")

    asyncio.run(scene())


def test_a_body_arrives_whole(tmp_path):
    async def scene():
        client = Client([PIECE, PIECE, LAST])
        await asked(echo, tmp_path / "s", client)
        assert client.status == 200 and client.body == b"piecepiece"

    asyncio.run(scene())


def test_a_client_that_hangs_up_is_told_to_the_application(tmp_path):
    async def scene():
        told = asyncio.Event()

        async def app(scope, receive, send):
            assert (await receive())["type"] == "http.request"
            client.hung_up.set()
            assert (await receive())["type"] == "http.disconnect"
            told.set()

        client = Client([LAST])
        await asked(app, tmp_path / "s", client)
        assert told.is_set()

    asyncio.run(scene())


def test_without_a_supervisor_the_answer_is_503(tmp_path):
    async def scene():
        client = Client([LAST])
        await Forwarder(str(tmp_path / "nobody"))(SCOPE, client.receive, client.send)
        assert client.status == 503 and b"EngineDead" in client.body

    asyncio.run(scene())


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, event_loop()], ids=["asyncio", "server's"])
@pytest.mark.parametrize("backlog", [relay.BACKLOG, 20])
def test_more_requests_than_the_supervisor_takes_at_once_are_all_answered(
    tmp_path, monkeypatch, backlog, loop_factory
):
    """All of them connect before it takes the first."""

    async def scene():
        clients = [Client([LAST]) for _ in range(200)]
        await asked(early, tmp_path / "s", *clients)
        assert [client.status for client in clients] == [200] * 200

    monkeypatch.setattr(relay, "BACKLOG", backlog)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scene())


@pytest.mark.parametrize("waiting", [0, 5])
def test_a_supervisor_that_takes_nothing_any_more_is_503(tmp_path, monkeypatch, waiting):
    """It has ended a connection at once, or none is taken and no more can wait."""

    async def scene():
        client = Client([LAST])
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen(0)
            others = [socket.socket(socket.AF_UNIX) for _ in range(waiting)]
            for one in others:
                one.setblocking(False)
                one.connect_ex(str(tmp_path / "s"))
            forwarded = asyncio.create_task(Forwarder(str(tmp_path / "s"))(SCOPE, client.receive, client.send))
            if not waiting:
                await asyncio.to_thread(lambda: listener.accept()[0].close())
            await forwarded
            for one in others:
                one.close()
        assert client.status == 503 and b"EngineDead" in client.body

    monkeypatch.setattr(relay, "PATIENCE_SECONDS", 0.1)
    asyncio.run(scene())
