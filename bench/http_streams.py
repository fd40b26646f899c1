"""The client of `bench.http_face`: many streams in one thread, cheap enough not to be what is measured.

It opens the connections, and asks the server for one step of its engine after another (`tick`): each brings every
stream one token. Knows nothing of the servers but the marker that each token's frame holds once.
"""

import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

READ_BYTES = 1 << 16
PATIENCE_SECONDS = 60.0


@dataclass(eq=False)
class _Stream:
    socket: socket.socket
    tokens: int = 0
    tail: bytes = b""  # the end of what was read, which may be the beginning of a marker


@dataclass
class Streams:
    """Open streams of one server. tick: makes the server's engine take a step."""

    port: int
    request: bytes
    marker: bytes
    tick: Callable[[], None]
    tokens: int = 0
    _open: dict[int, _Stream] = field(default_factory=dict)  # by file descriptor
    _poll: select.epoll = field(default_factory=select.epoll)

    def open(self, count: int) -> None:
        """Send the request on so many connections; the answers come with the first step."""
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", self.port))
            connection.sendall(self.request)
            connection.setblocking(False)
            self._open[connection.fileno()] = _Stream(connection)
            self._poll.register(connection.fileno(), select.EPOLLIN)

    def close(self) -> None:
        for stream in self._open.values():
            stream.socket.close()
        self._open.clear()
        self._poll.close()

    def run(self, steps: int) -> float:
        """Take so many steps, as fast as the server gives them out. Returns the seconds.

        Two are asked for at a time, so that the server always has work.
        """
        count, start, before = len(self._open), time.perf_counter(), self.tokens
        asked = 0
        while (done := self.tokens - before) < steps * count:
            while asked < steps and asked * count < done + 2 * count:
                self.tick()
                asked += 1
            self._read(PATIENCE_SECONDS)
        return time.perf_counter() - start

    def paced(self, steps: int, period: float) -> list[float]:
        """Take a step each `period` seconds. Returns how long after its step each token came."""
        delays: list[float] = []
        begun = {id(stream): stream.tokens for stream in self._open.values()}
        ticks: list[float] = []
        start, total, before = time.perf_counter(), steps * len(self._open), self.tokens
        while self.tokens - before < total:
            now = time.perf_counter()
            due = start + len(ticks) * period
            if len(ticks) < steps and now >= due:
                ticks.append(time.perf_counter())
                self.tick()
                continue
            wait = max(0.0, due - now) if len(ticks) < steps else PATIENCE_SECONDS
            for stream, new in self._read(wait):
                came = time.perf_counter()
                last = stream.tokens - begun[id(stream)]
                delays += [came - ticks[step] for step in range(last - new, last)]
        return delays

    def _read(self, wait: float) -> list[tuple[_Stream, int]]:
        """The streams that got tokens, and how many. Raises RuntimeError when one ended, or nothing comes."""
        found = []
        ready = self._poll.poll(wait)
        if not ready and wait == PATIENCE_SECONDS:
            raise RuntimeError(f"nothing came for {wait:g} s")
        for descriptor, _ in ready:
            stream = self._open[descriptor]
            data = stream.socket.recv(READ_BYTES)
            if not data:
                raise RuntimeError(f"a stream ended after {stream.tokens} tokens: {stream.tail[-200:]!r}")
            text = stream.tail + data
            new = text.count(self.marker)
            stream.tail = text[1 - len(self.marker) :]
            stream.tokens += new
            self.tokens += new
            found.append((stream, new))
        return found
