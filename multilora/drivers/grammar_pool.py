"""The server's side of `grammar_process.py`: bounded compiling of grammars, a few at a time.

A compile ends when its task is cancelled, when it has taken too much time or memory, or with its answer; it slows
another down only by the cores that they share. The process is started by the first grammar. All methods belong to one
event loop.
"""

import asyncio
import logging
import socket
import subprocess
import time
import weakref
from collections.abc import Callable

import msgspec

from multilora.drivers.grammar_process import GrammarResult
from multilora.errors import BadRequest, MultiloraError, QueueFull
from multilora.front.effects import CompiledText
from multilora.front.grammars.compiler import Setup
from multilora.front.grammars.source import unusable
from multilora.module_command import module_command

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
        self._control: socket.socket | None = None
        self._end: Callable[[], object] | None = None  # ends the process, here or when this object is gone
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
            data, seconds = await self._ask(await self._started(setup), request)
            if not data and self._ended():
                data, seconds = await self._ask(await self._started(setup), request)
            if not data:
                raise self._killed(field, seconds)
        finally:
            self._free.release()
        answer = msgspec.json.decode(data, type=GrammarResult)
        if answer.error is not None:
            raise BadRequest(answer.error, param=field)
        return CompiledText(answer.text, self._tokenizer_info)

    def close(self) -> None:
        """End the process, and with it whatever it compiles."""
        if self._end is not None:
            self._end()
            self._control = self._end = None

    async def _ask(self, control: socket.socket, request: bytes) -> tuple[bytes, float]:
        """The child's answer, empty if it was killed, and how long it took. Closing the connection, as a cancellation
        does, kills it too."""
        start = time.monotonic()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(control, [b"g"], [theirs.fileno()])
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException as e:
            ours.close()
            if isinstance(e, ConnectionError):
                return b"", 0.0
            raise
        try:
            writer.write(request)
            writer.write_eof()
            return await reader.read(), time.monotonic() - start
        except ConnectionError:  # it was killed before it had read all
            return b"", time.monotonic() - start
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
            try:
                await asyncio.wait_for(self._start(await asyncio.to_thread(setup.encode)), START_SECONDS)
            except BaseException as e:
                self.close()
                if isinstance(e, OSError | EOFError):  # a TimeoutError is an OSError
                    logger.exception("the process that compiles grammars does not start")
                    raise MultiloraError("the process that compiles grammars does not start") from e
                raise
            assert self._control is not None
            return self._control

    async def _start(self, setup: bytes) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), str(self._seconds), str(self._nbytes)]
            process = subprocess.Popen(
                module_command("multilora.drivers.grammar_process", *arguments),
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
        self._end = weakref.finalize(self, _end, process, self._control)
        await asyncio.to_thread(_write, process, setup)
        self._control.setblocking(False)
        size = int.from_bytes(await _receive(self._control, 8))
        self._tokenizer_info = (await _receive(self._control, size)).decode()


def _write(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(data)


def _end(process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
    control.close()
    process.kill()
    process.wait()


async def _receive(source: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises EOFError."""
    found = bytearray()
    while len(found) < size:
        data = await asyncio.get_running_loop().sock_recv(source, size - len(found))
        if not data:
            raise EOFError
        found += data
    return bytes(found)
