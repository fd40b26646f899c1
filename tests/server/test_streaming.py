"""Responses: JSON with infinities, event streams and their one ending, clients that hang up."""

import asyncio
import json

import pytest
from fakes.server_app import Connection, run
from starlette.requests import ClientDisconnect

from multilora.errors import CannotFit
from multilora.server.response_bytes import ResponseBudget
from multilora.server.streaming import FRAMES_AT_ONCE, EventStream, Json, frame, while_connected


async def connected():
    await asyncio.Event().wait()


async def gone():
    return {"type": "http.disconnect"}


def stream(frames, closed):
    async def app(scope, receive, send):
        response = await EventStream.begin(receive, frames(), lambda: closed.append(True), ResponseBudget(1 << 20))
        await response(scope, receive, send)

    return app


def test_infinity_is_null():
    assert json.loads(Json([float("-inf"), 1.5]).body) == [None, 1.5]


def test_while_connected_gives_the_result_and_the_error():
    async def work():
        return 5

    async def fail():
        raise CannotFit("x")

    async def scenario():
        assert await while_connected(connected, work()) == 5
        with pytest.raises(CannotFit):
            await while_connected(connected, fail())

    run(scenario())


def test_while_connected_cancels_when_the_client_is_gone():
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def scenario():
        with pytest.raises(ClientDisconnect):
            await while_connected(gone, work())
        assert ended == [True]

    run(scenario())


@pytest.mark.parametrize("turns", [2, 3, 4])
def test_a_result_that_nobody_gets_is_undone(turns):
    """The work ends, and before its caller runs again, or while it stops to watch the client, that is cancelled."""
    undone = []

    async def work():
        return 5

    async def scenario():
        calling = asyncio.ensure_future(while_connected(connected, work(), undone.append))
        for _ in range(turns):  # the caller waits; the work ends
            await asyncio.sleep(0)
        assert not calling.done()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert undone == [5]
        assert await while_connected(connected, work(), undone.append) == 5
        assert undone == [5]

    run(scenario())


def test_a_stream_is_sent_frame_by_frame_and_closed_once():
    closed = []

    async def frames():
        yield frame({"a": 1})
        yield frame({"a": 2})

    async def scenario():
        answer = await Connection(stream(frames, closed), "GET", "/").answer()
        assert answer.body == b'data: {"a":1}\n\ndata: {"a":2}\n\ndata: [DONE]\n\n'
        assert "content-length" not in answer.headers
        assert closed == [True]

    run(scenario())


def test_an_error_inside_is_one_frame_before_done():
    closed = []

    async def frames():
        yield frame({})
        raise CannotFit("too large")

    async def scenario():
        answer = await Connection(stream(frames, closed), "GET", "/").answer()
        assert answer.status == 200
        assert [f.get("error", {}).get("code") for f in answer.frames] == [None, "CannotFit"]
        assert closed == [True]

    run(scenario())


def test_our_own_bug_inside_is_a_frame_without_its_text(caplog):
    async def frames():
        yield frame({})
        raise RuntimeError("secret")

    async def scenario():
        answer = await Connection(stream(frames, []), "GET", "/").answer()
        assert answer.frames[1]["error"]["message"] == "internal error: RuntimeError"
        assert "secret" in caplog.text

    run(scenario())


def test_an_error_before_the_first_frame_is_raised():
    closed = []

    async def frames():
        raise CannotFit("too large")
        yield b""

    async def scenario():
        call = Connection(stream(frames, closed), "GET", "/")
        with pytest.raises(CannotFit):
            await call.task
        assert closed == [True]

    run(scenario())


def test_a_client_that_hangs_up_ends_the_frames():
    closed, ended = [], []

    async def frames():
        try:
            yield frame({})
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def scenario():
        call = Connection(stream(frames, closed), "GET", "/")
        await call.frame()
        call.hang_up()
        await call.answer()
        assert (closed, ended) == ([True], [True])

    run(scenario())


def test_a_hang_up_ends_frames_that_never_wait():
    """A backlog is such frames: all of it was formatted for nobody, while nobody else was served."""
    closed, made = [], []

    async def frames():
        for i in range(1_000_000):
            made.append(i)
            yield frame({})

    async def scenario():
        call = Connection(stream(frames, closed), "GET", "/")
        await call.frame()
        call.hang_up()
        await call.answer()
        assert len(made) < 20 * FRAMES_AT_ONCE
        assert closed == [True]

    run(scenario())


def test_others_run_between_frames_that_never_wait():
    turns = []

    async def frames():
        for _ in range(200):
            yield frame({})

    async def others():
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def scenario():
        task = asyncio.create_task(others())
        await Connection(stream(frames, []), "GET", "/").answer()
        task.cancel()
        assert len(turns) >= 200 // FRAMES_AT_ONCE

    run(scenario())
