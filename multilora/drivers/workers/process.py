"""The supervisor's handle on one front process: starts it, has its desk, and notices when it ends or hangs.

The process says something twice a second, from its event loop: one that is stopped or whose loop is held up does not.

All methods belong to one event loop. `server/workers/pool.py` starts another one.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import zmq
import zmq.asyncio

from multilora import logs
from multilora.drivers.async_driver import AsyncDriver
from multilora.drivers.workers.desk import Desk
from multilora.drivers.workers.names import NamesFeed
from multilora.errors import EngineDead
from multilora.front.workers.messages import (
    Collect,
    Observed,
    Serving,
    ToWorker,
    Welcome,
    decode_from_worker,
    encode,
)
from multilora.module_command import module_command

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""For imports and the tokenizer, on a machine that many share."""
CHECK_SECONDS = 0.25
"""Between two looks whether the process has said anything."""
LATE_SECONDS = 2.0
"""A look that comes so much later says that this process was held up itself, and has not heard the other one."""


class Silence:
    """How long a process has said nothing. Asked every CHECK_SECONDS. limit: seconds."""

    def __init__(self, limit: float, clock: Callable[[], float] = monotonic):
        self._limit = limit
        self._clock = clock
        self._heard_at = self._asked_at = clock()

    def end(self) -> None:
        """The process has said something."""
        self._heard_at = self._clock()

    def too_long(self) -> bool:
        """Whether the limit is passed."""
        now = self._clock()
        if now - self._asked_at > LATE_SECONDS:
            self._heard_at = now
        self._asked_at = now
        return now - self._heard_at > self._limit


class WorkerProcess:
    """Made by `start`. `ended` is done when the process has ended and its requests have, too."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        socket: zmq.asyncio.Socket,
        driver: AsyncDriver,
        names: NamesFeed,
        observe: Callable[[Observed], None],
    ):
        self.name = name
        self.desk = Desk(driver, self.send, self._observed)
        self._process = process
        self._socket = socket
        self._names = names
        self._observe = observe
        self._serving = asyncio.Event()
        self._collects: dict[int, asyncio.Future[None]] = {}
        self._last_collect = 0
        self._closed = False
        self._silence: Silence | None = None  # None: it may be silent
        self._listening: asyncio.Task[None] | None = None
        self.ended = asyncio.create_task(self._watch())

    @classmethod
    async def start(
        cls,
        name: str,
        module: str,
        listener: int,
        directory: Path,
        welcome: Callable[[], Welcome],
        driver: AsyncDriver,
        names: NamesFeed,
        observe: Callable[[Observed], None],
        heartbeat: float,
    ) -> "WorkerProcess":
        """Start `python -m MODULE NAME ADDRESS PARENT LISTENER` and wait until it serves on the socket `listener`.
        directory: for the socket between us; heartbeat: its longest silence from then on, in seconds, 0: any. Raises
        EngineDead if it ends before."""
        path = directory / f"{name}-{os.urandom(4).hex()}"
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        socket.set(zmq.LINGER, 0)
        socket.bind(f"ipc://{path}")
        command = module_command(module, name, f"ipc://{path}", str(os.getpid()), str(listener))
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=[listener],
            start_new_session=True,
        )
        worker = cls(name, process, socket, driver, names, observe)
        names.add(worker.desk, worker.send)  # what changes from here on comes after the snapshot
        worker.send(welcome())
        await worker._wait_until_serving()
        if heartbeat:
            worker._listening = asyncio.create_task(worker._listen(heartbeat))
        return worker

    def send(self, message: ToWorker) -> None:
        if not self._closed:
            self._socket.send(encode(message))

    async def collect(self) -> None:
        """Wait until what the worker has counted so far is known here, or the worker has ended."""
        self._last_collect += 1
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._collects[self._last_collect] = done
        self.send(Collect(self._last_collect))
        either: set[asyncio.Future[Any]] = {done, self.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    def kill(self, why: str) -> None:
        """End the process at once, with those that it has started; `ended` is done soon. Its compiler of grammars,
        which has a session of its own, ends when it finds its socket closed."""
        logger.error("%s is ended: %s", self.name, why)
        self._kill_group()

    async def close(self, timeout: float) -> None:
        """Let the process end by itself for so many seconds, then end it."""
        self._stop_listening()
        await asyncio.wait({self.ended}, timeout=timeout)
        if not self.ended.done():
            self.kill("it did not end in time")
            await self.ended

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _wait_until_serving(self) -> None:
        serving = asyncio.create_task(self._serving.wait())
        try:
            either: set[asyncio.Future[Any]] = {serving, self.ended}
            await asyncio.wait(either, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
            if not self._serving.is_set() or self.ended.done():
                self._kill_group()
                await self.ended
        if self.ended.done():
            raise EngineDead(f"{self.name} ended with code {self.ended.result()} before it served; see its log")

    async def _watch(self) -> int:
        """Take in what the worker says, until it ends. Returns its exit code."""
        receiving = asyncio.create_task(self._receive())
        try:
            code = await self._process.wait()
            self._kill_group()  # what it has started goes with it
            await asyncio.sleep(0.05)  # what it said last may still be on its way
        finally:
            receiving.cancel()
            self._stop_listening()
            self._closed = True
            self._names.remove(self.desk)
            self.desk.close()
            self._socket.close()
        return code

    async def _receive(self) -> None:
        try:
            while True:
                message = decode_from_worker(await self._socket.recv())
                if self._silence is not None:
                    self._silence.end()
                if isinstance(message, Serving):
                    self._serving.set()
                else:
                    self.desk.take(message)
        except Exception:  # nobody would hear the worker any more
            logger.exception("the messages of %s cannot be read", self.name)
            self.kill("its messages could not be read")

    async def _listen(self, seconds: float) -> None:
        """End the process once it has been silent for so long."""
        self._silence = silence = Silence(seconds)
        while not silence.too_long():
            await asyncio.sleep(CHECK_SECONDS)
        self.kill(f"it has given no sign of life for {seconds:g} s (--engine-heartbeat-timeout)")

    def _stop_listening(self) -> None:
        if self._listening is not None:
            self._listening.cancel()

    def _observed(self, observed: Observed) -> None:
        logs.RECENT.take(self.name, observed.log)
        self._observe(observed)
        if observed.call is not None and (done := self._collects.pop(observed.call, None)) is not None:
            done.set_result(None)
