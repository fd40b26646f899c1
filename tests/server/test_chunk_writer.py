"""Frames past ASGI's `send`, over real sockets: the same bytes, endings after them, no more than the client takes."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import httptools
import pytest
import uvicorn
from fakes.models import FakeEngineClient
from fakes.server_app import SECONDS, LocalServer
from fakes.tokenizers import byte_level_tokenizer

from multilora.engine.messages import Output
from multilora.server.chunk_writer import ChunkWriter
from multilora.server.uvicorn_setup import event_loop, uvicorn_config

IDS = list(range(3, 83))
BODIES = {
    "/v1/completions": {"prompt": [5, 6]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the cat"}]},
}


def run(scenario) -> None:
    async def limited():
        await asyncio.wait_for(scenario(), SECONDS)

    with asyncio.Runner(loop_factory=event_loop()) as runner:
        runner.run(limited())


@contextlib.asynccontextmanager
async def serving(local: LocalServer) -> AsyncIterator[int]:
    server = uvicorn.Server(uvicorn_config(local.app, 100))
    server.config.load()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        task = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task


def request(path: str, **fields) -> bytes:
    body = json.dumps(BODIES[path] | {"stream": True, "max_tokens": len(IDS), **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Parsed:
    """One answer, by a strict parser of HTTP."""

    def __init__(self):
        self.body, self.complete = b"", False
        self._parser = httptools.HttpResponseParser(self)
        self.feed = self._parser.feed_data

    def on_body(self, data):
        self.body += data

    def on_message_complete(self):
        self.complete = True

    @property
    def choices(self) -> list[dict]:
        events = [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n") if event]
        assert events[-1] == b"[DONE]"
        return [json.loads(event)["choices"][0] for event in events[:-1]]


@pytest.fixture
def written(monkeypatch) -> list[bool]:
    """Who asked whether a connection is ready, and what it was told."""
    asked, real = [], ChunkWriter.ready

    def ready(self):
        asked.append(real(self))
        return asked[-1]

    monkeypatch.setattr(ChunkWriter, "ready", ready)
    return asked


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_is_the_same_with_and_without(path, written, monkeypatch):
    local = LocalServer(FakeEngineClient(answer=lambda _: IDS, vocab_size=320), byte_level_tokenizer())
    found = {}

    async def scenario():
        async with serving(local) as port:
            for way in ("direct", "send"):
                if way == "send":
                    monkeypatch.setattr(ChunkWriter, "of", staticmethod(lambda scope: None))
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request(path))
                answer = Parsed()
                while not answer.complete:
                    answer.feed(await reader.read(65536))
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # the connection is still good
                assert b" 200 " in await reader.readline()
                writer.close()
                found[way] = answer.choices

    run(scenario)
    assert found["direct"] == found["send"]
    assert len(written) > len(IDS) // 2 and any(written)


def test_what_is_written_on_the_spot_counts_for_the_longest_answer(written):
    """--max-response-bytes: the error is the last event, and the connection is good for the next request."""
    client = FakeEngineClient(answer=lambda _: IDS, vocab_size=320)
    local = LocalServer(client, byte_level_tokenizer(), max_response_bytes=5000)

    async def scenario():
        async with serving(local) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request("/v1/completions"))
            answer = Parsed()
            while not answer.complete:
                answer.feed(await reader.read(65536))
            *events, done, rest = answer.body.split(b"\n\n")
            assert (done, rest) == (b"data: [DONE]", b"")
            error = json.loads(events.pop().removeprefix(b"data: "))["error"]
            assert error["code"] == "ResponseTooLarge"
            sent = sum(len(event) + 2 for event in events)
            assert 5000 - 500 < sent <= 5000 and len(events) > 5
            assert client.aborted
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in await reader.readline()
            writer.close()

    run(scenario)
    assert any(written)


def test_a_client_that_reads_nothing_is_written_no_more(written):
    """Its backlog waits where it is merged, not in the connection."""
    client = FakeEngineClient(answer=lambda _: IDS, vocab_size=320, context_length=1 << 20)
    local = LocalServer(client, byte_level_tokenizer(), max_request_seconds=None)

    async def scenario():
        async with serving(local) as port:
            client.gate.clear()
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            writer.transport.pause_reading()
            writer.write(request("/v1/completions", max_tokens=100_000))
            while not client._running:
                await asyncio.sleep(0)
            [(_, deliver)] = client._running.values()
            key = client.submitted[0].rid
            while False not in written:
                deliver(Output(rid=key, token_ids=[40] * 1000))
                await asyncio.sleep(0)
            before = len(written)
            for _ in range(50):
                deliver(Output(rid=key, token_ids=[40] * 1000))
                await asyncio.sleep(0)
            assert len(written) <= before + 1, "its reader is busy with what did not fit"
            writer.transport.resume_reading()
            writer.close()
            while not client.aborted:
                await asyncio.sleep(0.01)

    run(scenario)


def test_other_servers_offer_none():
    assert ChunkWriter.of({"type": "http"}) is None
