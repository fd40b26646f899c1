"""The engine as the front sees it, whatever becomes of its process: one that dies or hangs is started again.

    up ── the process ends, or is ended because it hangs ──► down ── pause, start, adapters, requests again ──► up
                                                              └── too often in a row (--max-engine-restarts) ──► dead

`book.py` knows what the next engine must be given, `restarts.py` how often and when. Adapters keep their versions.
One whose files are gone or changed is tried again and again; requests for it get AdapterUnavailable meanwhile. Calls
that come while the engine is down wait for the next one. All methods belong to one event loop.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Self, TypeVar

import msgspec

from multilora.config import Config
from multilora.engine.messages import (
    AdapterInfo,
    Finished,
    FlushCache,
    Output,
    Ready,
    Reply,
    StartProfile,
    Stats,
    Submit,
    ToEngine,
)
from multilora.engine.process.book import MAX_RUNS, EngineBook, KeptAdapter, OpenRequest
from multilora.engine.process.client import EngineClient
from multilora.engine.process.restarts import RestartCount
from multilora.errors import AdapterUnavailable, EngineDead, EngineRestarting, MultiloraError
from multilora.tracing import SpanRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")
StartEngine = Callable[[Config], Awaitable[EngineClient]]
LOADS_AT_ONCE = 8
FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0


class EngineSupervisor:
    """Made by `start`. `ready`: as the present or the latest engine said. on_spans: see `EngineClient`."""

    def __init__(self, config: Config, start_engine: StartEngine):
        self.on_spans: Callable[[list[SpanRecord]], None] = lambda _records: None
        self._config = config
        self._start_engine = start_engine
        self._book = EngineBook()
        self._restarts = RestartCount(config.max_engine_restarts)
        self._client: EngineClient | None = None  # while the engine is up, with all its adapters
        self._latest: EngineClient
        self._up = asyncio.Event()  # or dead
        self._dead: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._longest_start = float(config.watchdog_timeout)

    @classmethod
    async def start(cls, config: Config, start_engine: StartEngine = EngineClient.start) -> Self:
        """Start the engine process and wait until it is ready. Raises the typed error it failed with."""
        supervisor = cls(config, start_engine)
        began = monotonic()
        client = await start_engine(config)
        supervisor._longest_start += 2 * (monotonic() - began)
        supervisor._take_over(client)
        return supervisor

    # ------------------------------------------------------------------ its state

    @property
    def alive(self) -> bool:
        """Whether there is an engine, or another one is coming."""
        return self._dead is None

    @property
    def restarting(self) -> bool:
        """Whether there is no engine now, and another one is coming."""
        return self._client is None and self._dead is None

    @property
    def restarts(self) -> int:
        """How often an engine was started again."""
        return self._restarts.total

    @property
    def ready(self) -> Ready:
        return self._latest.ready

    @property
    def stats(self) -> Stats:
        return self._latest.stats

    @property
    def profile_root(self) -> Path:
        """The directory below which profiles are written."""
        return self._latest.profile_root

    # ------------------------------------------------------------------ requests

    def submit(self, message: Submit, deliver: Callable[[Output], None]) -> None:
        """Send a request; its rid is never used again. `deliver` gets its outputs; the last one has `finished`. While
        the engine is down the request waits."""
        request = self._book.open(message, deliver)
        if self._dead is not None:
            request.end(Finished(type="error", kind="EngineDead", message=self._dead))
        elif self._client is not None:
            self._send(request, self._client)

    def abort(self, rid: str, message: str = "aborted") -> None:
        """The request's last Output will say `abort`. A rid that is unknown or has ended is ignored."""
        request = self._book.requests.get(rid)
        if request is None:
            return
        if self._client is not None:
            self._client.abort(rid, message)
        else:
            request.end(Finished(type="abort", message=message))

    def finish(self, rid: str) -> None:
        """A stop string matched: nothing more is wanted, no Output follows."""
        if self._book.requests.pop(rid, None) is not None and self._client is not None:
            self._client.finish(rid)

    def use_tokenizer(self, info: str) -> None:
        """What grammars are bound to: xgrammar's serialized TokenizerInfo."""
        self._book.tokenizer = info
        if self._client is not None:
            self._client.use_tokenizer(info)

    def _send(self, request: OpenRequest, client: EngineClient) -> None:
        for version, _ in request.message.adapters:
            kept = self._book.adapters.get(version)
            if kept is not None and kept.lost is not None:
                request.end(Finished(type="error", kind="AdapterUnavailable", message=kept.lost.message))
                return
        request.runs += 1
        client.submit(request.message, request.take)

    # ------------------------------------------------------------------ calls

    async def load_adapter(self, version: int, path: str, pinned: bool) -> AdapterInfo:
        """Raises the typed errors of `multilora.errors`; nothing has changed then."""
        info = await self._ask(lambda client: client.load_adapter(version, path, pinned))
        self._book.adapters[version] = KeptAdapter(info, path, pinned)
        return info

    async def unload_adapter(self, version: int) -> None:
        """No request is on it. Once begun it is not undone: an engine that ends meanwhile has forgotten it, too."""
        await self._when_up()
        kept = self._book.remove_adapter(version)
        client = self._client
        if client is not None and (kept is None or kept.lost is None):
            try:
                await client.unload_adapter(version)
            except EngineDead:
                if client.alive:
                    raise

    async def flush_cache(self) -> None:
        """Drop every idle prefix."""
        await self.call(FlushCache)

    async def call(self, message: Callable[[int], ToEngine]) -> Reply:
        """Send the message that is made of the call's number. Raises the typed error of its reply."""
        reply = await self._ask(lambda client: client.call(message))
        self._book.note_call(message(0), reply)
        return reply

    async def start_profile(self, wanted: StartProfile) -> None:
        """Raises BadRequest if a profile is running."""
        await self._present().start_profile(wanted)

    async def stop_profile(self) -> None:
        """Returns when the trace is written. Raises BadRequest if no profile is running."""
        await self._present().stop_profile()

    async def shutdown(self, timeout: float = 60.0) -> None:
        """Let the engine finish what runs, for at most `timeout` seconds, and end it; none is started any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        client, self._client = self._client, None
        if client is not None:
            client.on_end = lambda _reason: None
            await client.shutdown(timeout)
        self._give_up("the server has shut down")

    def end(self, why: str) -> None:
        """End the engine at once, whatever it does; none is started any more."""
        self._latest.on_end = lambda _reason: None
        self._give_up(why)
        self._latest.kill(why)

    def _present(self) -> EngineClient:
        """The engine, if it is up."""
        if self._client is None:
            raise EngineDead(self._dead) if self._dead else EngineRestarting("the engine is being started again")
        return self._client

    async def _when_up(self) -> EngineClient:
        await self._up.wait()
        while self._client is None and self._dead is None:  # it has ended again before this task came to run
            await self._up.wait()
        return self._present()

    async def _ask(self, ask: Callable[[EngineClient], Awaitable[T]]) -> T:
        """What the engine answers; if it ends meanwhile, what the next one answers, once."""
        for _ in range(MAX_RUNS - 1):
            client = await self._when_up()
            try:
                return await ask(client)
            except EngineDead:
                if client.alive:
                    raise
        return await ask(await self._when_up())

    # ------------------------------------------------------------------ the end of an engine, and the next one

    def _take_over(self, client: EngineClient) -> None:
        """The engine is up, and has what it needs."""
        self._restarts.started()
        client.on_end = self._ended
        client.on_spans = lambda records: self.on_spans(records)
        self._latest = self._client = client
        for request in list(self._book.requests.values()):
            self._send(request, client)
        self._up.set()
        if self._book.lost():
            self._spawn(self._bring_back(client))

    def _ended(self, reason: str) -> None:
        ended, self._client = self._client, None
        assert ended is not None
        self._up.clear()
        pause = self._restarts.next_pause()
        if pause is None:
            self._give_up(f"{reason}; restart the server")
            return
        self._book.interrupt(reason)
        self._spawn(self._restart(ended, pause))

    def _give_up(self, reason: str) -> None:
        if self._dead is None:
            self._dead = reason
            self._book.end_all(reason)
            self._up.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the engine cannot be supervised any more", exc_info=error)
            self._give_up(f"the engine cannot be supervised any more: {type(error).__name__}; restart the server")

    async def _restart(self, ended: EngineClient, pause: float | None) -> None:
        await ended.shutdown(0)  # frees what the handle holds
        reason = ""
        while pause is not None:
            logger.warning("starting another engine %s", f"in {pause:.0f} s" if pause else "now")
            await asyncio.sleep(pause)
            began = monotonic()
            try:
                client = await asyncio.wait_for(self._start_engine(self._config), self._longest_start)
                await self._restore(client)
            except (MultiloraError, OSError) as e:  # a TimeoutError is an OSError
                reason = f"{type(e).__name__}: {e}".rstrip(": ")
                logger.error("the engine could not be started again: %s", reason)
                pause = self._restarts.next_pause()
                continue
            logger.warning("the engine is up again after %.1f s", monotonic() - began)
            self._take_over(client)
            return
        self._give_up(f"the engine could not be started again: {reason}; restart the server")

    async def _restore(self, client: EngineClient) -> None:
        """Give a new engine what the last one had, but for its requests. Raises EngineDead if it ends meanwhile."""
        try:
            if self._book.tokenizer is not None:
                client.use_tokenizer(self._book.tokenizer)
            free = asyncio.Semaphore(LOADS_AT_ONCE)

            async def load(version: int) -> None:
                async with free:
                    await self._load_again(client, version)

            async with asyncio.TaskGroup() as group:
                for version in self._book.adapters:
                    group.create_task(load(version))
            for message in self._book.pauses:
                await client.call(partial(_with_number, message))
        except BaseException as e:
            client.kill("what the last one had could not be given to it")
            await client.shutdown(0)
            if isinstance(e, BaseExceptionGroup):
                raise e.exceptions[0] from None
            raise

    async def _load_again(self, client: EngineClient, version: int) -> None:
        """Have the engine load what its predecessor had as `version`. Raises EngineDead."""
        kept = self._book.adapters.get(version)
        if kept is None:
            return
        try:
            info = await client.load_adapter(version, kept.path, kept.pinned)
        except EngineDead:
            raise
        except MultiloraError as e:
            kept.lost = AdapterUnavailable(f"the engine was started again, and this adapter is not back: {e}")
            logger.error("adapter version %d is not back: %s", version, e)
            return
        if version not in self._book.adapters:  # unloaded meanwhile
            await client.unload_adapter(version)
        elif info.fingerprint != kept.info.fingerprint:
            await client.unload_adapter(version)
            changed = f"{kept.path} has changed since it was loaded: unload it and load it again"
            kept.lost = AdapterUnavailable(f"the engine was started again, and this adapter is not back: {changed}")
            logger.error("adapter version %d is not back: %s", version, changed)
        else:
            kept.lost = None

    async def _bring_back(self, client: EngineClient) -> None:
        """Try again to load what could not be restored, until it is there or the engine ends."""
        pause = FIRST_RETRY_SECONDS
        with contextlib.suppress(EngineDead):
            while client is self._client and (lost := self._book.lost()):
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_RETRY_SECONDS)
                for version in lost:
                    await self._load_again(client, version)


def _with_number(message: ToEngine, call: int) -> ToEngine:
    return msgspec.structs.replace(message, call=call)
