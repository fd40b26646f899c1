"""The cluster's HTTP face: every request goes to a replica, whose answer is passed on as it comes.

The ingress reads of a request what routes it, and changes nothing, so every dialect is a replica's own. As long as
nothing of an answer has been passed on, a request whose replica dies, or cannot serve it now, is sent to another one,
with the same body and so the same seed; a stream that has begun ends with an error that says to try again. Knows
nothing of Ray: `send` brings a request to a replica.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from multilora.cluster import asgi_exchange
from multilora.cluster.cluster_config import ClusterConfig
from multilora.cluster.cluster_table import ClusterTable
from multilora.cluster.merged_answers import merge
from multilora.cluster.request_reading import Reach, reach_of, read_request
from multilora.cluster.route_request import RouteRequest
from multilora.errors import EngineRestarting, MultiloraError
from multilora.front.access import NOBODY
from multilora.server.anthropic.errors import SHAPES
from multilora.server.errors import error_body, error_response
from multilora.server.key_ring import KeyRing
from multilora.server.streaming import DONE, frame, named_frame
from multilora.server.tensors import MAX_BODY_BYTES

logger = logging.getLogger(__name__)

ELSEWHERE = frozenset({"EngineDead", "EngineRestarting", "ServerStopping", "AdapterUnavailable"})
"""Errors of a replica that say nothing about another one."""
LOST = "the replica of this request has ended; send it again"
NOBODY_THERE = "no replica is ready; try again later"
TENSORS_PATH = "/load_lora_adapter_from_tensors"
TENSORS_AT_A_TIME = 2
"""Bodies with adapters in them that one ingress holds; others are read when it is their turn."""
WHOLE_SECONDS = 10.0
"""For the answer of one replica of all, until it counts as lost: it may be dead, and that not yet known."""

Pieces = AsyncGenerator[list[Message], None]
SendTo = Callable[[RouteRequest, str | None, dict[str, Any], bytes], Pieces]
"""Brings a request (scope, body) to the replica that is named, else to one that a router chooses. The first message
has type `multilora.replica` and its `name`; the others are what the application there sends.

Raises ReplicaLostError."""


class ReplicaLostError(Exception):
    """The replica of a request has ended, or cannot be reached."""


@dataclasses.dataclass
class _Answer:
    """One attempt. begun: something of it was passed on; start: the first message, until then."""

    replica: str = ""
    start: Message | None = None
    begun: bool = False
    streams: bool = False


class Ingress:
    """ASGI. members: names of the replicas that there are."""

    def __init__(
        self,
        config: ClusterConfig,
        keys: KeyRing,
        table: ClusterTable,
        send: SendTo,
        members: Callable[[], Coroutine[Any, Any, Sequence[str]]],
    ):
        self._config, self._keys, self._table = config, keys, table
        self._send_to, self._members = send, members
        self._most_body = config.engine.max_body_bytes
        self._tensors = asyncio.Semaphore(TENSORS_AT_A_TIME)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"].rstrip("/") or "/"
        if path in ("/health", "/ping"):
            await _respond({}, scope, receive, send)
            return
        if path == "/ready" and not await self._members():
            await error_response(EngineRestarting(NOBODY_THERE))(scope, receive, send)
            return
        if path != TENSORS_PATH:
            await self._take(path, scope, receive, send, self._most_body)
            return
        async with self._tensors:
            await self._take(path, scope, receive, send, MAX_BODY_BYTES)

    async def _take(self, path: str, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        body = await asgi_exchange.read_body(receive, most)
        if body is None:
            return
        travelling = asgi_exchange.travelling_scope(scope)
        work = asyncio.ensure_future(self._serve(path, travelling, body, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()

    async def _serve(self, path: str, scope: dict[str, Any], body: bytes, send: Send) -> None:
        reach = reach_of(path)
        if reach is Reach.ONE:
            await self._serve_by_one(path, scope, body, send)
            return
        answers = await asyncio.gather(*(self._whole(name, scope, body) for name in sorted(await self._members())))
        status, headers, content = merge(path, [answer for answer in answers if answer is not None])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": False})

    # ------------------------------------------------------------------ one replica

    async def _serve_by_one(self, path: str, scope: dict[str, Any], body: bytes, send: Send) -> None:
        caller = self._keys.caller(_key(scope)) or self._keys.nobody or NOBODY
        request = read_request(scope, body, self._table, self._config.engine.model_name, caller)
        only = await self._owner_of_response(path, scope, body)
        for attempt in range(self._config.retries + 1):
            answer, last = _Answer(), attempt == self._config.retries
            try:
                if await self._pass_on(answer, request, only, scope, body, send, final=last):
                    return
            except ReplicaLostError:
                logger.warning("replica %s was lost during a request for %s", answer.replica or "of a request", path)
                if answer.begun:
                    await _end_broken(path, answer, send)
                    return
            request = dataclasses.replace(request, avoid=request.avoid | {answer.replica})
        await _refuse(path, EngineRestarting(LOST), send)

    async def _pass_on(
        self,
        answer: _Answer,
        request: RouteRequest,
        only: str | None,
        scope: dict[str, Any],
        body: bytes,
        send: Send,
        *,
        final: bool,
    ) -> bool:
        """False: the replica says that another one should be asked. final: then that is the answer."""
        async with contextlib.aclosing(self._send_to(request, only, scope, body)) as pieces:
            async for some in pieces:
                for message in some:
                    if message["type"] == "multilora.replica":
                        answer.replica = message["name"]
                    elif message["type"] == "http.response.start":
                        answer.start = message
                        answer.streams = b"text/event-stream" in dict(message["headers"]).get(b"content-type", b"")
                    elif not answer.begun and not final and _elsewhere(answer.start, message):
                        return False
                    else:
                        await _forward(answer, message, send)
        if not answer.begun:
            raise ReplicaLostError
        return True

    async def _owner_of_response(self, path: str, scope: dict[str, Any], body: bytes) -> str | None:
        """The replica that has stored the response that a request is about; None: it is about none, or nobody has."""
        wanted = ""
        if path.startswith("/v1/responses/"):
            wanted = path.split("/")[3]
        elif path == "/v1/responses" and b"previous_response_id" in body:
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                wanted = str(json.loads(body).get("previous_response_id") or "")
        if not wanted:
            return None
        lookup = scope | {"method": "GET", "path": f"/v1/responses/{wanted}", "query_string": b""}
        lookup["raw_path"] = lookup["path"].encode(errors="replace")
        names = sorted(await self._members())
        for name, answer in zip(
            names, await asyncio.gather(*(self._whole(n, lookup, b"") for n in names)), strict=True
        ):
            if answer is not None and answer[1] == 200:
                return name
        return None

    async def _whole(self, name: str, scope: dict[str, Any], body: bytes) -> tuple[str, int, list[Any], bytes] | None:
        """One replica's answer, all of it: name, status, headers, body. None: it is lost."""
        status, headers, content = 0, list[Any](), b""
        try:
            async with (
                asyncio.timeout(WHOLE_SECONDS),
                contextlib.aclosing(self._send_to(RouteRequest(), name, scope, body)) as pieces,
            ):
                async for some in pieces:
                    for message in some:
                        if message["type"] == "http.response.start":
                            status, headers = message["status"], message["headers"]
                        elif message["type"] == "http.response.body":
                            content += message.get("body", b"")
        except (ReplicaLostError, TimeoutError):
            logger.warning("replica %s does not answer %s", name, scope["path"])
            return None
        return (name, status, headers, content) if status else None


def _key(scope: dict[str, Any]) -> str:
    headers = Headers(raw=scope["headers"])
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _elsewhere(start: Message | None, message: Message) -> bool:
    if start is None or start["status"] != 503 or message.get("more_body"):
        return False
    try:
        return json.loads(message.get("body", b"")).get("error", {}).get("code") in ELSEWHERE
    except (ValueError, AttributeError):
        return False


async def _forward(answer: _Answer, message: Message, send: Send) -> None:
    if not answer.begun and answer.start is not None:
        answer.begun = True
        await send(answer.start)
    await send(message)


async def _end_broken(path: str, answer: _Answer, send: Send) -> None:
    """The last frame of a stream whose replica is gone. What is no stream cannot be ended well: the connection is
    closed in the middle, by the error."""
    if not answer.streams:
        raise EngineRestarting(LOST)
    error = EngineRestarting(LOST)
    if path in SHAPES:
        ending = named_frame("error", SHAPES[path](error))
    elif path == "/v1/responses":
        ending = named_frame("error", {"type": "error", "code": error.kind, "message": error.message, "param": None})
    else:
        ending = frame(error_body(error)) + DONE
    await send({"type": "http.response.body", "body": ending, "more_body": False})


async def _refuse(path: str, error: MultiloraError, send: Send) -> None:
    response = error_response(error, SHAPES[path](error) if path in SHAPES else None)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": False})


async def _respond(content: Any, scope: Scope, receive: Receive, send: Send) -> None:
    from starlette.responses import JSONResponse

    await JSONResponse(content)(scope, receive, send)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
