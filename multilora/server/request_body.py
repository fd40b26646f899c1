"""A request's JSON body: read within bounds of size and time, and decoded where it holds up nobody.

Owns how many bytes of bodies are in memory at a time, and the threads that decode and validate the large ones. What
takes long in one native call, millions of tiny values, is refused by counting before. Used by `errors.StrictRoute`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request

from multilora.errors import BadRequest, PayloadTooLarge, QueueFull, RequestTimeout

T = TypeVar("T")

INLINE_BYTES = 64 << 10
"""Bodies up to here may be decoded on the event loop, which takes a millisecond."""
IDLE_SECONDS = 30.0
"""Between two pieces of a body."""
TOTAL_SECONDS = 300.0
BODIES_AT_ONCE = 8
"""As many bodies of the largest size may be in memory,"""
LARGER_AT_ONCE = 2
"""or of a route's that takes larger ones."""
MAX_VALUES = 2_000_000
"""Numbers, texts and so on in one body."""
MAX_TEXTS = 500_000
"""Texts in one body, names of fields too: each of them is an object that takes 0.2 us and more to make, while nobody
else's code runs."""
MAX_CONTAINERS = 100_000
"""Lists and objects in one body."""
_COUNTED_AT_ONCE = 4 << 20  # bytes; other threads get their turn in between
_SORTED_AT_ONCE = 256 << 10  # bytes, sorted into texts and the rest; a few milliseconds
_THREADS = 2


class Bodies:
    """The bodies of all requests of one server. max_bytes: of one body, where a route has no other limit."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._held: Counter[int] = Counter()  # limit of the route → bytes of bodies there
        self._pool = ThreadPoolExecutor(_THREADS, "body")

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

    async def decode(self, body: bytes, function: Callable[[bytes], T], max_bytes: int | None = None) -> T:
        """`function(body)` on a thread. Raises BadRequest if the body has too many values, QueueFull.

        max_bytes: as it was read with.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        try:
            self._hold(len(body), limit)
            return await asyncio.get_running_loop().run_in_executor(self._pool, _decode, body, function)
        finally:
            self._held[limit] -= len(body)

    def _hold(self, size: int, limit: int) -> None:
        self._held[limit] += size
        if self._held[limit] > limit * (BODIES_AT_ONCE if limit <= self.max_bytes else LARGER_AT_ONCE):
            raise QueueFull(f"{self._held[limit]} bytes of request bodies are being read; try again later")


def _too_large(limit: int, advice: str) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body has over {limit} bytes{advice}")


def _decode(body: bytes, function: Callable[[bytes], T]) -> T:
    check_values(body)
    return function(body)


def check_values(body: bytes) -> None:
    """Raise BadRequest for more values, texts, or lists and objects than are decoded."""
    containers = _count(body, b"[") + _count(body, b"{")
    if _count(body, b'"') <= 2 * MAX_TEXTS and _count(body, b",") <= MAX_VALUES and containers <= MAX_CONTAINERS:
        return
    quotes = values = containers = 0
    for piece in _pieces(body):  # what is in texts does not count
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        bare = b"".join(parts[quotes % 2 :: 2])
        quotes += len(parts) - 1
        values += bare.count(b",")
        containers += bare.count(b"[") + bare.count(b"{")
        for number, most, what in (
            (quotes // 2, MAX_TEXTS, "texts"),
            (values, MAX_VALUES, "values"),
            (containers, MAX_CONTAINERS, "lists and objects"),
        ):
            if number > most:
                raise BadRequest(f"the body has over {most} {what}")


def _pieces(body: bytes) -> Iterator[bytes]:
    """The body in pieces, no escape in two of them. Other threads get their turn in between."""
    start = 0
    while start < len(body):
        piece = body[start : start + _SORTED_AT_ONCE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = body[start : start + len(piece) + 1]
        yield piece
        start += len(piece)


def _count(body: bytes, what: bytes) -> int:
    starts = range(0, len(body), _COUNTED_AT_ONCE)
    return sum(body.count(what, start, start + _COUNTED_AT_ONCE) for start in starts)
