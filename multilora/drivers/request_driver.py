"""Drives the requests of a front by asyncio; `async_driver.py` adds the changes of adapters and the engine's calls.

A request is cancelled with its task: it is aborted and its adapters are released. Blocking work runs on a few
threads, a pool for each lane. All methods belong to one event loop.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from multilora.drivers.async_generation import AsyncGeneration
from multilora.drivers.grammar_pool import GrammarPool
from multilora.drivers.mailbox import LoopTurns, Mailbox
from multilora.engine.messages import Output
from multilora.errors import MultiloraError
from multilora.front.adapter_ref import Held
from multilora.front.effects import (
    CarryThrough,
    CompileGrammar,
    Effect,
    Gather,
    Lane,
    RunBlocking,
    Spawn,
    Steps,
    WaitUntilDone,
    Within,
)
from multilora.front.generation import Job
from multilora.front.request_front import RequestFront
from multilora.tracing import spanning

logger = logging.getLogger(__name__)

T = TypeVar("T")
DOWNLOADS = frozenset({Lane.HUB, Lane.HTTP, Lane.S3, Lane.GS})
THREADS = {Lane.TEXT: 4, Lane.LONG_TEXT: 2, Lane.FILES: 8, Lane.STATE: 1, Lane.TENSORS: 4} | dict.fromkeys(
    DOWNLOADS, 16
)


class RequestDriver:
    """Drives the requests of one front on the running event loop."""

    def __init__(self, front: RequestFront):
        self.front = front
        self._grammars = GrammarPool(front.config.grammar_timeout, front.config.grammar_max_bytes)
        self._turns = LoopTurns()
        self._changes: set[asyncio.Task[Any]] = set()
        self._pools = {lane: ThreadPoolExecutor(count, lane.value) for lane, count in THREADS.items()}

    async def generate(
        self, jobs: Sequence[Job], rids: Sequence[str] | None = None, most_bytes: int | None = None
    ) -> AsyncGeneration:
        """Check and submit. On any error, and when cancelled, nothing is sent and no adapter is held.

        most_bytes: see `AsyncGeneration`.
        """
        outputs = Mailbox[Output]()
        generation = await self._run(self.front.submit(jobs, outputs.put, rids))
        return AsyncGeneration(generation, outputs, self._turns, most_bytes)

    async def hold(self, names: Iterable[str]) -> Sequence[Held]:
        """See `Resolver.hold`. When cancelled nothing is held; what is being fetched goes on."""
        return await self._run(self.front.resolver.hold(names))

    async def run_blocking(self, lane: Lane, function: Callable[[], T]) -> T:
        """Call `function` on a thread of the lane, and wait for its result."""
        return await asyncio.get_running_loop().run_in_executor(self._pools[lane], function)

    async def close(self) -> None:
        """No more blocking work is begun."""
        self._grammars.close()
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, steps: Steps[T]) -> T:
        try:
            effect = next(steps)
            while True:
                try:
                    result = await self._perform(effect)
                except BaseException as e:  # a cancellation too: the work cleans up  # noqa: BLE001 - thrown into the work
                    effect = steps.throw(e)
                else:
                    effect = steps.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    async def _perform(self, effect: Effect[Any]) -> Any:  # noqa: RET503 - effects without a result
        match effect:
            case RunBlocking():
                return await self._run_blocking(effect)
            case CompileGrammar(setup, field, source):
                return await self._grammars.compile(setup, field, source)
            case WaitUntilDone(flight, seconds):
                done = asyncio.Event()
                flight.when_done(done.set)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(done.wait(), seconds)
            case Within(steps, seconds, error):
                return await self._run_within(steps, seconds, error)
            case CarryThrough(steps):
                return await asyncio.shield(self._start(steps))
            case Spawn(steps, flight):
                task = self._start(steps)
                if flight is not None:
                    flight.cancel = task.cancel
            case Gather(children, limit):
                return await self._gather(children, limit)
            case other:
                raise AssertionError(f"not an effect: {other!r:.100}")

    async def _run_blocking(self, effect: RunBlocking[T]) -> T:
        """The result of its function. When cancelled: see `RunBlocking`."""
        future = self._pools[effect.lane].submit(effect.function)
        try:
            if effect.lane not in DOWNLOADS:
                return await asyncio.wrap_future(future)
            with spanning("download", **{"multilora.source": effect.lane.value}):
                return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if effect.stop is not None:
                effect.stop()
            if (undo := effect.undo) is not None:
                future.add_done_callback(lambda done: _undo(done, undo))
            raise

    async def _run_within(self, steps: Steps[T], seconds: float, error: MultiloraError) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await self._run(steps)
        except TimeoutError:
            raise error from None

    async def _gather(self, children: Sequence[Steps[T]], limit: int) -> list[T | BaseException]:
        free = asyncio.Semaphore(limit)

        async def one(child: Steps[T]) -> T:
            async with free:
                return await self._run(child)

        return await asyncio.gather(*map(one, children), return_exceptions=True)

    def _start(self, steps: Steps[T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(self._run(steps))
        self._keep(task)
        return task

    def _keep(self, task: "asyncio.Task[Any]") -> None:
        """Hold on to a task that nobody else may wait for."""
        self._changes.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._changes.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            if isinstance(error, MultiloraError):
                logger.info("adapter change failed: %s", error)
            else:
                logger.error("adapter change failed", exc_info=error)


def _undo(done: "Future[T]", undo: Callable[[T], object]) -> None:
    """The work has been cancelled, but this part of it may have ended well."""
    if not done.cancelled() and done.exception() is None:
        undo(done.result())
