"""The front's handle on an engine process: asyncio on this side, ZeroMQ in between.

Starts the process, sends messages, hands each request's Outputs to the function given with it, and notices when the
process dies or hangs, which ends it and all that it has started: then every waiting request and call ends with
EngineDead. `supervisor.py` starts another one. All methods belong to one event loop.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec
import zmq
import zmq.asyncio

from multilora.config import Config
from multilora.engine.adapter_stats import AdapterStatsTable
from multilora.engine.messages import (
    Abort,
    AdapterInfo,
    Failed,
    Finish,
    Finished,
    FlushCache,
    FromEngine,
    LoadAdapter,
    Output,
    Outputs,
    Ready,
    Reply,
    Shutdown,
    Spans,
    StartProfile,
    Stats,
    StopProfile,
    Submit,
    ToEngine,
    UnloadAdapter,
    UseTokenizer,
    decode_from_engine,
    encode,
)
from multilora.engine.process.openmp import environment
from multilora.engine.process.pulse import PULSE_SECONDS, PulseMonitor
from multilora.errors import ConfigError, EngineDead, from_wire
from multilora.module_command import module_command
from multilora.private_directory import PrivateDirectory, remove_orphans
from multilora.tracing import SpanRecord, current_traceparent

logger = logging.getLogger(__name__)

MAX_SOCKET_PATH = 103  # bytes; what every system takes
RANKS_FIRST_SECONDS = 10
"""A group of ranks notices by itself which of them hangs, and has so much longer to say so."""


class EngineClient:
    """Made by `start`. `ready`: as the engine said at its start; `stats`: the latest; `profile_root`: where profiles
    are written, without --profile-dir in a directory that goes with the client. on_end: is told why the process has
    ended, before requests and calls are; on_spans: is given what the engine has done for traced requests."""

    restarting = False  # that is its supervisor's business
    restarts = 0
    ready: Ready
    stats: Stats

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        socket: zmq.asyncio.Socket,
        directory: PrivateDirectory,
        monitor: PulseMonitor,
        profile_dir: str | None = None,
    ):
        self.on_end: Callable[[str], None] = lambda _reason: None
        self.on_spans: Callable[[list[SpanRecord]], None] = lambda _records: None
        self.profile_root = Path(profile_dir or directory.path / "profiles")
        self._process = process
        self._socket = socket
        self._directory = directory
        self._monitor = monitor
        self._why = ""  # it was killed
        self._receivers: dict[str, Callable[[Output], None]] = {}  # by rid
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._last_call = 0
        self._adapter_stats = AdapterStatsTable()
        self._dead: str | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, config: Config) -> Self:
        """Start the engine process and wait until it is ready. Raises the typed error it failed with."""
        remove_orphans()
        directory = PrivateDirectory("engine")
        address = f"ipc://{directory.path / 'socket'}"
        if len(address.encode()) - len("ipc://") > MAX_SOCKET_PATH:
            directory.close()
            raise ConfigError(f"TMPDIR is too long for a socket in it: {directory.path.parent}")
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        socket.set(zmq.LINGER, 0)
        socket.bind(address)
        monitor, pulses = _open_pulse(config)
        command = module_command("multilora.engine.process.worker", address, str(os.getpid()), str(pulses))
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                env=environment(),
                pass_fds=[pulses],
                start_new_session=True,
            )
        finally:
            os.close(pulses)
        client = cls(process, socket, directory, monitor, config.profile_dir)
        try:
            await socket.send(msgspec.msgpack.encode(config))
            await client._wait_until_ready()
        except BaseException:
            client._kill_group()
            await process.wait()
            client._close()
            raise
        client._tasks = [asyncio.create_task(work) for work in (client._receive(), client._watch(), client._listen())]
        return client

    async def _wait_until_ready(self) -> None:
        ended = asyncio.create_task(self._process.wait())
        answer = asyncio.ensure_future(self._socket.recv())
        await asyncio.wait({ended, answer}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            raise EngineDead(f"the engine process ended with code {ended.result()} before it was ready; see its log")
        ended.cancel()
        match decode_from_engine(answer.result()):
            case Ready() as ready:
                self.ready, self.stats = ready, self._adapter_stats.merge(ready.stats)
            case Failed(kind, message):
                raise from_wire(kind, message)
            case other:
                raise AssertionError(f"not a start: {other}")

    # ------------------------------------------------------------------ requests

    @property
    def alive(self) -> bool:
        return self._dead is None

    def submit(self, message: Submit, deliver: Callable[[Output], None]) -> None:
        """Send a request; its rid is never used again. `deliver` gets its outputs; the last one has `finished`."""
        if self._dead is not None:
            deliver(self._dead_output(message.rid))
        else:
            self._receivers[message.rid] = deliver
            self._send(message)

    def abort(self, rid: str, message: str = "aborted") -> None:
        """The request's last Output will say `abort`. A rid that is unknown or has ended is ignored."""
        if rid in self._receivers:
            self._send(Abort(rid, message))

    def finish(self, rid: str) -> None:
        """A stop string matched: nothing more is wanted, no Output follows."""
        if self._receivers.pop(rid, None) is not None:
            self._send(Finish(rid))

    def use_tokenizer(self, info: str) -> None:
        """What grammars are bound to: xgrammar's serialized TokenizerInfo."""
        self._send(UseTokenizer(info))

    # ------------------------------------------------------------------ calls

    async def load_adapter(self, version: int, path: str, pinned: bool) -> AdapterInfo:
        """Raises the typed errors of `multilora.errors`; nothing has changed then."""
        call = self._next_call()
        parent = current_traceparent()
        message = LoadAdapter(call=call, version=version, path=path, pinned=pinned, traceparent=parent)
        reply = await self._call(call, message)
        assert reply.info is not None
        return reply.info

    async def unload_adapter(self, version: int) -> None:
        call = self._next_call()
        await self._call(call, UnloadAdapter(call, version))

    async def flush_cache(self) -> None:
        await self.call(FlushCache)

    async def call(self, message: Callable[[int], ToEngine]) -> Reply:
        """Send the message that is made of the call's number. Raises the typed error of its reply."""
        call = self._next_call()
        return await self._call(call, message(call))

    async def start_profile(self, wanted: StartProfile) -> None:
        """Raises BadRequest if a profile is running. `wanted.call` is set here."""
        call = self._next_call()
        await self._call(call, msgspec.structs.replace(wanted, call=call))

    async def stop_profile(self) -> None:
        """Returns when the trace is written. Raises BadRequest if no profile is running."""
        call = self._next_call()
        await self._call(call, StopProfile(call))

    async def shutdown(self, timeout: float = 60.0) -> None:
        """Let the engine finish what runs, for at most `timeout` seconds, and end it."""
        if self._dead is None:
            self._send(Shutdown())
        if self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), timeout)
            except TimeoutError:
                logger.warning("the engine did not end within %.0f s; killing it", timeout)
                self._kill_group()
                await self._process.wait()
        self._die("the server has shut down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._close()

    def _next_call(self) -> int:
        self._last_call += 1
        return self._last_call

    async def _call(self, call: int, message: ToEngine) -> Reply:
        if self._dead is not None:
            raise EngineDead(self._dead)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call] = future
        self._send(message)
        reply = await future
        if not reply.ok:
            raise from_wire(reply.kind, reply.message)
        return reply

    # ------------------------------------------------------------------ the socket

    def _send(self, message: ToEngine) -> None:
        if self._dead is None:
            self._socket.send(encode(message))

    async def _receive(self) -> None:
        try:
            while True:
                self._take(decode_from_engine(await self._socket.recv()))
        except Exception:  # nobody would hear the engine any more
            logger.exception("the engine's messages cannot be read; ending it")
            self.kill("its messages could not be read")

    def _take(self, message: FromEngine) -> None:
        match message:
            case Outputs(items):
                for output in items:
                    self._deliver(output)
            case Reply() as reply:
                future = self._calls.pop(reply.call, None)
                if future is not None and not future.done():
                    future.set_result(reply)
            case Spans(items):
                self.on_spans(items)
            case Stats() as stats:
                self.stats = self._adapter_stats.merge(stats)
            case other:
                raise AssertionError(f"not expected now: {other}")

    def _deliver(self, output: Output) -> None:
        deliver = self._receivers.get(output.rid)
        if deliver is not None:  # else the front has finished it
            if output.finished is not None:
                del self._receivers[output.rid]
            deliver(output)

    # ------------------------------------------------------------------ its end

    def end(self, why: str) -> None:
        """End the process at once, whatever it does."""
        self.kill(why)

    def kill(self, why: str) -> None:
        """End the process, its ranks and its loader at once, whatever they do; `on_end` hears of it soon."""
        self._why = self._why or why
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _listen(self) -> None:
        while (wrong := self._monitor.check()) is None:
            await asyncio.sleep(PULSE_SECONDS)
        logger.error("the engine process hangs: %s; killing it", wrong)
        self.kill(wrong)

    async def _watch(self) -> None:
        code = await self._process.wait()
        self._kill_group()  # what it has started goes with it
        await asyncio.sleep(0.05)  # what it said last may still be on its way
        said = f"was ended: {self._why}" if self._why else f"ended with code {code}"
        logger.error("the engine process %s", said)
        self._die(f"the engine process {said}")

    def _die(self, reason: str) -> None:
        if self._dead is not None:
            return
        self._dead = reason
        self.on_end(reason)
        receivers, self._receivers = self._receivers, {}
        for rid, deliver in receivers.items():
            deliver(self._dead_output(rid))
        for future in self._calls.values():
            if not future.done():
                future.set_result(Reply(call=0, ok=False, kind="EngineDead", message=reason))
        self._calls.clear()

    def _dead_output(self, rid: str) -> Output:
        return Output(rid=rid, finished=Finished(type="error", kind="EngineDead", message=self._dead or ""))

    def _close(self) -> None:
        self._socket.close()
        self._directory.close()
        self._monitor.close()


def _open_pulse(config: Config) -> tuple[PulseMonitor, int]:
    """What hears the engine's heartbeat, and the descriptor for the engine's end."""
    reading, writing = os.pipe()
    step = config.watchdog_timeout + (RANKS_FIRST_SECONDS if config.tp_size > 1 else 0)
    return PulseMonitor(reading, config.engine_heartbeat_timeout, step), writing
