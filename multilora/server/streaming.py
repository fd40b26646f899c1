"""What HTTP adds to an answer: JSON and server-sent events as responses, and noticing that the client hung up.

Knows nothing of models or text. A closed connection cancels the work; `EventStream` calls `close` when the stream
ends, however it does, and turns an error inside the stream into one last frame, before `[DONE]` where there is one.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from multilora.errors import MultiloraError
from multilora.server.errors import error_body
from multilora.server.response_bytes import ResponseBudget

logger = logging.getLogger(__name__)

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"

FRAMES_AT_ONCE = 8
"""Frames after which others run, and a hang-up is seen, though each was there when the one before was sent."""

StreamEvent = dict[str, Any]
"""An event whose `type` is its name, for `named_frame`."""


class Json(Response):
    """A JSON response; infinities become null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def frame(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def named_frame(name: str, content: Any) -> bytes:
    """One server-sent event that has a name."""
    return b"event: " + name.encode() + b"\n" + frame(content)


def _error_frame(error: MultiloraError) -> bytes:
    return frame(error_body(error))


async def while_connected(
    receive: Receive, work: Awaitable[T], undo: Callable[[T], object] = lambda _result: None
) -> T:
    """The result of `work`. Cancels it and raises ClientDisconnect when the client hangs up first.

    undo: called with a result that nobody gets, because this call was cancelled when the work had just ended.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    handed_on = False
    try:
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for other in (task, watcher):
                other.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)
        if task.cancelled():
            raise ClientDisconnect
        handed_on = True
        return task.result()
    finally:
        if not handed_on and task.done() and not (task.cancelled() or task.exception()):
            undo(task.result())


class Closes(Protocol):
    """What is under way until it is closed: a generation, or an answer made of one."""

    @property
    def close(self) -> Callable[[], None]: ...


def close(begun: Closes) -> None:
    """An `undo` of `while_connected`."""
    begun.close()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `frames` as they come, then `done`. `close` is called at the end, also after an error.

    budget: what the frames may take of it in all; the ending is sent in any case.
    error_frame: makes the frame of an error inside the stream, in the words of the route.
    """

    media_type = "text/event-stream"

    @classmethod
    async def begin(
        cls,
        receive: Receive,
        frames: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        budget: ResponseBudget,
        *,
        error_frame: Callable[[MultiloraError], bytes] = _error_frame,
        done: bytes = DONE,
    ) -> "EventStream":
        """Waits for the first frame: an error before it is raised, and so gets an HTTP status of its own."""
        try:
            first = budget.spend(await while_connected(receive, anext(frames)))
        except BaseException:
            close()
            raise
        return cls(first, frames, close, budget, error_frame, done)

    def __init__(
        self,
        first: bytes,
        frames: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        budget: ResponseBudget,
        error_frame: Callable[[MultiloraError], bytes],
        done: bytes,
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._frames = frames
        self._close = close
        self._budget = budget
        self._error_frame = error_frame
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - part of the contract
        try:
            await while_connected(receive, self._write(send))
        except (ClientDisconnect, OSError):
            logger.debug("client disconnected during a stream")
        finally:
            self._close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sent, data, ending = 0, self._first, b""
        while True:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            sent += 1
            if sent % FRAMES_AT_ONCE == 0:
                await asyncio.sleep(0)  # `send` and frames that are there already let nobody else run
            try:
                data = self._budget.spend(await anext(self._frames))
            except StopAsyncIteration:
                break
            except MultiloraError as e:
                ending = self._error_frame(e)
                break
            except Exception as e:
                logger.exception("error inside a stream")
                ending = self._error_frame(MultiloraError(f"internal error: {type(e).__name__}"))
                break
        await send({"type": "http.response.body", "body": ending + self._done, "more_body": False})
