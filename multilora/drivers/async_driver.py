"""Drives the front by asyncio, beside an engine process: for the server and for `AsyncLLM`.

Requests are `request_driver.py`'s. As they are, a load is cancelled with its task, until it is to be committed; every
other change that has begun is carried through. All methods belong to one event loop.
"""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from multilora.drivers.request_driver import RequestDriver
from multilora.engine.messages import AdapterInfo, Reply, StartProfile, ToEngine
from multilora.errors import MultiloraError, ServerStopping
from multilora.front.admission import STOPPING
from multilora.front.effects import Effect, EngineCall, EngineLoad, EngineUnload, Steps, WaitUntilIdle
from multilora.front.engine_link import EngineLink
from multilora.front.front import Front
from multilora.tracing import SpanRecord, spanning

T = TypeVar("T")


class AsyncEngine(EngineLink, Protocol):
    """An engine whose calls can be awaited: the shape of `engine.process.client.EngineClient`."""

    async def load_adapter(self, version: int, path: str, pinned: bool) -> AdapterInfo:
        """Raises AdapterError; nothing has changed then. EngineDead if the engine ends."""

    async def unload_adapter(self, version: int) -> None: ...

    async def flush_cache(self) -> None: ...

    async def call(self, message: Callable[[int], ToEngine]) -> Reply:
        """Send the message that is made of the call's number. Raises the typed error of its reply."""

    @property
    def profile_root(self) -> Path:
        """The directory below which profiles are written."""

    async def start_profile(self, wanted: StartProfile) -> None:
        """Raises BadRequest if a profile is running."""

    async def stop_profile(self) -> None:
        """Returns when the trace is written. Raises BadRequest if no profile is running."""

    async def shutdown(self, timeout: float = 60.0) -> None:
        """Let the engine finish what runs, for at most `timeout` seconds, and end it."""

    def end(self, why: str) -> None:
        """End the engine at once, whatever it does."""


class AsyncDriver(RequestDriver):
    """Drives one engine and its front on the running event loop. export_span: sends a span of this process to where
    traces go; None: nobody traces."""

    front: Front
    export_span: Callable[[SpanRecord], None] | None = None

    def __init__(self, engine: AsyncEngine, front: Front):
        super().__init__(front)
        self.engine = engine
        self._loads: set[asyncio.Task[Any]] = set()
        self._stopped = False

    async def change(self, steps: Steps[T]) -> T:
        """Carry a change of an adapter through, even if the caller is cancelled meanwhile."""
        return await asyncio.shield(self._start(steps))

    async def load(self, steps: Steps[T]) -> T:
        """Load an adapter. When cancelled before it is committed, it is as if the load had never begun. Raises
        ServerStopping if that is why."""
        task = asyncio.create_task(self._run(steps))
        self._loads.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self._stopped:
                raise ServerStopping(STOPPING) from None
            raise
        finally:
            self._loads.discard(task)

    def stop(self) -> None:
        """End what requests and loads there are, with ServerStopping."""
        self._stopped = True
        self.front.stop()
        for task in self._loads:
            task.cancel()

    async def close(self) -> None:
        """Let the engine finish what runs, and end it; no more blocking work is begun."""
        await self.engine.shutdown()
        await super().close()

    async def _perform(self, effect: Effect[Any]) -> Any:  # noqa: RET503 - effects without a result
        match effect:
            case EngineLoad(version, path, pinned):
                return await self._load_adapter(version, path, pinned)
            case EngineUnload(version):
                await self.engine.unload_adapter(version)
            case EngineCall(message):
                return await self.engine.call(message)
            case WaitUntilIdle(version):
                idle = asyncio.Event()
                self.front.registry.when_idle(version, idle.set)
                await idle.wait()
            case _:
                return await super()._perform(effect)

    async def _load_adapter(self, version: int, path: str, pinned: bool) -> AdapterInfo:
        """When cancelled, the engine forgets the adapter as soon as it has it."""
        with spanning("load_adapter", **{"multilora.adapter.version": version}):
            load = asyncio.create_task(self.engine.load_adapter(version, path, pinned))
            try:
                return await asyncio.shield(load)
            except asyncio.CancelledError:
                self._keep(asyncio.create_task(self._unload_when_loaded(load, version)))
                raise

    async def _unload_when_loaded(self, load: "asyncio.Task[AdapterInfo]", version: int) -> None:
        with contextlib.suppress(MultiloraError):
            await load
            await self.engine.unload_adapter(version)
