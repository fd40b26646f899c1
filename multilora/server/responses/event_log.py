"""The events of one background response, from the first on: any number of readers follow it from wherever they like.

Owns the events as frames of a stream, since a response object changes after an event has shown it. Knows nothing of
requests; whoever runs the response appends to it.
"""

import asyncio
from collections.abc import AsyncGenerator

from multilora.server.streaming import StreamEvent, named_frame


def event_frame(event: StreamEvent) -> bytes:
    """An event as it is sent."""
    return named_frame(event["type"], event)


class EventLog:
    """nbytes: of all frames so far."""

    def __init__(self) -> None:
        self.ended = False
        self.nbytes = 0
        self._frames: list[bytes] = []
        self._news = asyncio.Event()  # set, and replaced, with each change

    def __len__(self) -> int:
        return len(self._frames)

    def append(self, data: bytes) -> None:
        """An event as a frame; its number is the log's length before it."""
        self._frames.append(data)
        self.nbytes += len(data)
        self._wake()

    def end(self) -> None:
        """Nothing more comes."""
        self.ended = True
        self._wake()

    async def frames(self, start: int) -> AsyncGenerator[bytes, None]:
        """The events from number `start` on, as they come, to the last one."""
        number = start
        while True:
            news = self._news
            while number < len(self._frames):
                yield self._frames[number]
                number += 1
            if self.ended:
                return
            if news is self._news:
                await news.wait()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
