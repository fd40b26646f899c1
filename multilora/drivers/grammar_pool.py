"""The server's side of `grammar_process.py`: bounded compiling of grammars, a few at a time.

A compile ends when its task is cancelled, when it has taken too much time or memory, or with its answer; it slows
another down only by the cores that they share. The process is started by the first grammar. All methods belong to one
event loop.
"""

import asyncio
import contextlib
import logging
import socket
import sys
import time

import msgspec

from multilora.drivers.grammar_process import Answer
from multilora.errors import BadRequest, MultiloraError, QueueFull
from multilora.front.effects import CompiledText
from multilora.front.grammars.compiler import Setup
from multilora.front.grammars.source import unusable

logger = logging.getLogger(__name__)

AT_ONCE = 4
MAX_WAITING = 64
START_SECONDS = 120.0


class GrammarPool:
    """seconds: of computing for one grammar; nbytes: of memory, besides the process's own."""

    def __init__(self, seconds: float, nbytes: int):
        self._seconds = seconds
        self._nbytes = nbytes
        self._free = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._tokenizer_info = ""

    async def compile(self, setup: Setup, field: str, source: str) -> CompiledText:
        """Raises BadRequest, and QueueFull when too many wait."""
        if self._waiting >= MAX_WAITING:
            raise QueueFull(f"{self._waiting} grammars wait to be compiled; try again later")
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            request = msgspec.json.encode((field, source))
            start = time.monotonic()
            data = await self._ask(await self._started(setup), request)
            if not data and self._ended():
                start = time.monotonic()
                data = await self._ask(await self._started(setup), request)
            if not data:
                raise self._killed(field, time.monotonic() - start)
        finally:
            self._free.release()
        answer = msgspec.json.decode(data, type=Answer)
        if answer.error is not None:
            raise BadRequest(answer.error, param=field)
        return CompiledText(answer.text, self._tokenizer_info)

    def close(self) -> None:
        """End the process, and with it whatever it compiles."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process = None

    async def _ask(self, control: socket.socket, request: bytes) -> bytes:
        """The child's answer; empty: it was killed. Closing the connection, as a cancellation does, kills it too."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(control, [b"g"], [theirs.fileno()])
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException as e:
            ours.close()
            if isinstance(e, ConnectionError):
                return b""
            raise
        try:
            writer.write(request)
            writer.write_eof()
            return await reader.read()
        except ConnectionError:
            return b""  # it was killed before it had read all
        finally:
            writer.close()

    def _ended(self) -> bool:
        """Whether the process itself is gone, and not just the child."""
        if self._control is None:
            return True
        try:
            return self._control.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def _killed(self, field: str, seconds: float) -> BadRequest:
        if seconds >= 0.9 * self._seconds:
            return unusable(field, f"it takes over {self._seconds:g} s to compile (--grammar-timeout)")
        return unusable(field, f"it takes over {self._nbytes} bytes to compile (--grammar-max-bytes)")

    async def _started(self, setup: Setup) -> socket.socket:
        async with self._starting:
            if self._control is not None and not self._ended():
                return self._control
            self.close()
            ours, theirs = socket.socketpair()
            try:
                await asyncio.wait_for(self._start(setup, ours, theirs), START_SECONDS)
            except BaseException as e:
                self.close()
                ours.close()
                if isinstance(e, OSError | EOFError | TimeoutError):
                    logger.exception("the process that compiles grammars does not start")
                    raise MultiloraError("the process that compiles grammars does not start") from e
                raise
            finally:
                theirs.close()
            self._control = ours
            return ours

    async def _start(self, setup: Setup, ours: socket.socket, theirs: socket.socket) -> None:
        encoded = await asyncio.to_thread(setup.encode)
        command = [sys.executable, "-m", "multilora.drivers.grammar_process", str(theirs.fileno())]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            str(self._seconds),
            str(self._nbytes),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()  # so that its end is seen
        assert self._process.stdin is not None
        self._process.stdin.write(encoded)
        self._process.stdin.write_eof()
        ours.setblocking(False)
        size = int.from_bytes(await _receive(ours, 8))
        self._tokenizer_info = (await _receive(ours, size)).decode()


async def _receive(source: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises EOFError."""
    found = bytearray()
    while len(found) < size:
        data = await asyncio.get_running_loop().sock_recv(source, size - len(found))
        if not data:
            raise EOFError
        found += data
    return bytes(found)
