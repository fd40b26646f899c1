"""A request's JSON body: read within bounds of size and time, and decoded where it holds up nobody.

Owns how many bytes of bodies are in memory at a time, and the process and the threads that decode and validate the
large ones. Used by `StrictRoute`.
"""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request

from multilora.errors import PayloadTooLarge, QueueFull, RequestTimeout
from multilora.server.body_process import BodyProcess
from multilora.server.body_values import body_values

INLINE_BYTES = 64 << 10
"""Bodies up to here may be decoded on the event loop, which takes a millisecond."""
IDLE_SECONDS = 30.0
"""Between two pieces of a body."""
TOTAL_SECONDS = 300.0
BODIES_AT_ONCE = 8
"""As many bodies of the largest size may be in memory,"""
LARGER_AT_ONCE = 2
"""or of a route's that takes larger ones."""
_THREADS = 2


class Bodies:
    """The bodies of all requests of one server. max_bytes: of one body, where a route has no other limit.
    `process`: the one that decodes most of the large ones, once a server has started it."""

    def __init__(self, max_bytes: int, log: tuple[str, str] = ("info", "text")):
        self.max_bytes = max_bytes
        self._held: Counter[int] = Counter()  # limit of the route → bytes of bodies there
        self._pool = ThreadPoolExecutor(_THREADS, "body")
        self._asking = ThreadPoolExecutor(1, "body process")
        self.process = BodyProcess(log)

    async def read(self, request: Request, max_bytes: int | None = None, advice: str = "") -> bytes:
        """The body. Raises PayloadTooLarge as soon as it is known to be too long, RequestTimeout, QueueFull."""
        limit = self.max_bytes if max_bytes is None else max_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
            raise _too_large(limit, advice)
        chunks: list[bytes] = []
        size = 0
        clock = asyncio.get_running_loop().time
        end = clock() + TOTAL_SECONDS
        try:
            async with asyncio.timeout_at(min(end, clock() + IDLE_SECONDS)) as timeout:
                async for chunk in request.stream():
                    timeout.reschedule(min(end, clock() + IDLE_SECONDS))
                    size += len(chunk)
                    self._hold(len(chunk), limit)
                    chunks.append(chunk)
                    if size > limit:
                        raise _too_large(limit, advice)
            return b"".join(chunks)
        except TimeoutError:
            raise RequestTimeout(f"the body did not come in time: {size} bytes were read") from None
        finally:
            self._held[limit] -= size

    async def decode(self, body: bytes, kind: Any, max_bytes: int | None = None) -> Any:
        """Return `body_values(body, kind)`, made in the process beside this one where that is ready and the route
        takes no larger bodies than others, which are few texts; else on a thread. Raises BadRequest if the body has
        too many values or is none of its kind, QueueFull.

        max_bytes: as it was read with.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        beside = max_bytes is None and isinstance(kind, type)
        run = asyncio.get_running_loop().run_in_executor
        try:
            self._hold(len(body), limit)
            if beside and await run(self._asking, self.process.is_ready):
                return await run(self._asking, self.process.read, body, kind)
            return await run(self._pool, body_values, body, kind)
        finally:
            self._held[limit] -= len(body)

    def _hold(self, size: int, limit: int) -> None:
        self._held[limit] += size
        if self._held[limit] > limit * (BODIES_AT_ONCE if limit <= self.max_bytes else LARGER_AT_ONCE):
            raise QueueFull(f"{self._held[limit]} bytes of request bodies are being read; try again later")


def _too_large(limit: int, advice: str) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body has over {limit} bytes{advice}")
