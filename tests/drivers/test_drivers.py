"""Both drivers perform the front's effects alike: results, errors, order, limits. Work here asks no engine.

Covers `async_driver.py`, `request_driver.py`, `stepping.py` too.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import SECONDS, LocalServer

from multilora.drivers.request_driver import THREADS
from multilora.drivers.stepping import SteppingDriver
from multilora.engine.process.local import LocalEngine
from multilora.errors import AdapterUnavailable, ServerStopping
from multilora.front.effects import (
    CarryThrough,
    Effect,
    EngineLoad,
    Gather,
    Lane,
    RunBlocking,
    Spawn,
    Steps,
    WaitUntilIdle,
    Within,
)
from multilora.front.registry import AdapterRegistry

Run = Callable[[Steps[Any]], Any]


class NoEngine:
    """`on_step` is what a step does."""

    calling = False

    def __init__(self, on_step: Callable[[], None]):
        self.step = on_step

    def forget_calls(self) -> None: ...


def stepping(registry: AdapterRegistry, on_step: Callable[[], None]) -> Run:
    return SteppingDriver(NoEngine(on_step), registry).run  # type: ignore[arg-type]


def by_asyncio(registry: AdapterRegistry, on_step: Callable[[], None]) -> Run:
    driver = LocalServer(FakeEngineClient(), None).driver
    driver.front.registry = registry

    async def stepped(steps: Steps[Any]) -> Any:
        task = asyncio.create_task(driver.change(steps))
        while not task.done():
            await asyncio.sleep(0.001)
            if not task.done():
                on_step()
        return await task

    return lambda steps: asyncio.run(asyncio.wait_for(stepped(steps), SECONDS))


@pytest.fixture(params=[stepping, by_asyncio])
def make(request: pytest.FixtureRequest) -> Callable[..., Run]:
    def make(registry: AdapterRegistry | None = None, on_step: Callable[[], None] = lambda: None) -> Run:
        made: Run = request.param(registry or AdapterRegistry("base", True), on_step)
        return made

    return make


def call(function: Callable[[], Any]) -> Steps[Any]:
    return (yield from RunBlocking(Lane.FILES, function))


def fail() -> None:
    raise KeyError("x")


def test_results_and_errors(make: Callable[..., Run]) -> None:
    def steps() -> Steps[list[Any]]:
        found = [(yield from call(lambda: 1))]
        try:
            yield from call(fail)
        except KeyError:
            found.append("caught")
        return found

    assert make()(steps()) == [1, "caught"]
    with pytest.raises(KeyError):
        make()(call(fail))


def test_many_effects_do_not_deepen_the_stack(make: Callable[..., Run]) -> None:
    def steps() -> Steps[int]:
        total = 0
        for i in range(3000):
            total += yield from call(lambda i=i: i)
        return total

    assert make()(steps()) == 3000 * 2999 // 2


def test_gather_keeps_the_order_and_the_errors(make: Callable[..., Run]) -> None:
    def steps() -> Steps[list[Any]]:
        return (yield from Gather([call(lambda: 1), call(fail), call(lambda: 3)], 2))

    one, error, three = make()(steps())
    assert (one, three) == (1, 3) and isinstance(error, KeyError)

    def failing_at_once() -> Steps[Any]:
        raise ValueError
        yield

    def many() -> Steps[list[Any]]:
        return (yield from Gather([failing_at_once() for _ in range(3000)], 8))

    assert {type(error) for error in make()(many())} == {ValueError}

    def none() -> Steps[list[Any]]:
        return (yield from Gather([], 8))

    assert make()(none()) == []


def holding(registry: AdapterRegistry, names: str) -> tuple[list[int], Any]:
    """Versions, and what a request on all of them holds."""
    versions = [registry.begin_load(name, "/p") for name in names]
    for version in versions:
        registry._versions[version].num_requests = 1
    return versions, [registry._versions[version] for version in versions]


def test_side_by_side_up_to_the_limit(make: Callable[..., Run]) -> None:
    registry = AdapterRegistry("base", True)
    versions, refs = holding(registry, "abcde")
    running: set[int] = set()
    most = 0

    def wait(version: int) -> Steps[int]:
        nonlocal most
        running.add(version)
        most = max(most, len(running))
        yield from WaitUntilIdle(version)
        running.discard(version)
        return version

    def on_step() -> None:
        """The request on one of those that are waited for ends; the last begun first."""
        ref = next(r for r in reversed(refs) if r.version in running)
        if ref.num_requests:
            ref.num_requests = 0
            callbacks, ref.idle_callbacks = ref.idle_callbacks, []
            for callback in callbacks:
                callback()

    def steps() -> Steps[list[Any]]:
        return (yield from Gather([wait(version) for version in versions], 2))

    assert make(registry, on_step)(steps()) == versions
    assert most == 2


def test_spawned_work_is_not_waited_for_and_its_error_is_logged(
    make: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    registry = AdapterRegistry("base", True)
    [version], _ = holding(registry, "a")

    def never() -> Steps[None]:
        yield from WaitUntilIdle(version)

    def steps() -> Steps[str]:
        yield from Spawn(never())
        yield from Spawn(call(fail))
        yield from call(lambda: __import__("time").sleep(0.05))
        return "done"

    assert make(registry)(steps()) == "done"
    assert "adapter change failed" in caplog.text


def test_what_is_no_effect_is_our_mistake(make: Callable[..., Run]) -> None:
    def steps() -> Steps[None]:
        yield Effect()

    with pytest.raises(AssertionError, match="not an effect"):
        make()(steps())


def test_an_interrupt_cleans_up() -> None:
    registry = AdapterRegistry("base", True)
    versions, _ = holding(registry, "ab")
    cleaned: list[int] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    def wait(version: int) -> Steps[None]:
        try:
            yield from WaitUntilIdle(version)
        finally:
            cleaned.append(version)

    def steps() -> Steps[list[Any]]:
        return (yield from Gather([wait(version) for version in versions], 8))

    with pytest.raises(KeyboardInterrupt):
        stepping(registry, interrupt)(steps())
    assert cleaned == versions


def test_an_engine_that_raises_is_not_waited_for_afterwards() -> None:
    class Raising:
        """An engine that takes a call, and raises in the next step."""

        running, faults = False, [RuntimeError("of the engine")]

        def handle(self, message: Any) -> None: ...

        def step(self) -> list[Any]:
            raise self.faults.pop()

    driver = SteppingDriver(LocalEngine(Raising()), AdapterRegistry("base", True))  # type: ignore[arg-type]

    def load() -> Steps[Any]:
        return (yield from EngineLoad(1, "/a", False))

    with pytest.raises(RuntimeError, match="of the engine"):
        driver.run(load())
    assert driver.run(call(lambda: 7)) == 7


def test_a_load_that_is_given_up_is_forgotten_by_the_engine_when_it_has_it() -> None:
    """Also one that takes too long, or is cut off by the end of the server."""
    s = LocalServer(FakeEngineClient(), None)
    gate = asyncio.Event()
    load_adapter = s.client.load_adapter

    async def slow(version: int, path: str, pinned: bool) -> Any:
        await gate.wait()
        return await load_adapter(version, path, pinned)

    s.client.load_adapter = slow

    async def scenario() -> None:
        driver, manager = s.driver, s.driver.front.adapters
        given_up = asyncio.create_task(driver.load(manager.load("a", "/a")))
        while not s.registry.is_loading("a"):
            await asyncio.sleep(0)
        manager._load_seconds = 0.01
        with pytest.raises(AdapterUnavailable, match="not loaded within"):
            await driver.load(manager.load("b", "/b"))
        manager._load_seconds = 100
        cut_off = asyncio.create_task(driver.load(manager.load("c", "/c")))
        while not s.registry.is_loading("c"):
            await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        driver.stop()
        with pytest.raises(ServerStopping):
            await cut_off
        assert not s.registry._versions
        gate.set()
        while driver._changes:
            await asyncio.sleep(0.001)
        assert s.client.loaded == {} and len(s.client.unloaded) == 3

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def test_blocking_work_that_is_cancelled_is_stopped_or_undone() -> None:
    driver = LocalServer(FakeEngineClient(), None).driver
    begun, stop, undone = threading.Event(), threading.Event(), threading.Event()
    results: list[str] = []

    def work() -> str:
        begun.set()
        assert stop.wait(SECONDS)
        return "done all the same"

    def undo(result: str) -> None:
        results.append(result)
        undone.set()

    def steps() -> Steps[str]:
        return (yield from RunBlocking(Lane.FILES, work, stop.set, undo))

    async def scenario() -> None:
        task = asyncio.create_task(driver.load(steps()))
        await asyncio.to_thread(begun.wait, SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(undone.wait, SECONDS)

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    assert results == ["done all the same"]


@pytest.mark.parametrize("run_of", [stepping, by_asyncio])
def test_work_within_other_work(run_of: Any) -> None:
    def inner(value: int) -> Steps[int]:
        if value < 0:
            raise AdapterUnavailable("below zero")
        return (yield from RunBlocking(Lane.FILES, lambda: value + 1))

    def outer() -> Steps[list[Any]]:
        found = [(yield from Within(inner(1), 10, AdapterUnavailable("late"))), (yield from CarryThrough(inner(2)))]
        with pytest.raises(AdapterUnavailable, match="below zero"):
            yield from Within(inner(-1), 10, AdapterUnavailable("late"))
        with pytest.raises(AdapterUnavailable, match="below zero"):
            yield from CarryThrough(inner(-1))
        return found

    registry = AdapterRegistry("base", enabled=True)
    assert run_of(registry, lambda: None)(outer()) == [2, 3]


def test_lanes_are_bounded_and_do_not_wait_for_each_other() -> None:
    driver = LocalServer(FakeEngineClient(), None).driver
    release = threading.Event()
    running = dict.fromkeys(Lane, 0)
    lock = threading.Lock()

    def block(lane: Lane) -> None:
        with lock:
            running[lane] += 1
        assert release.wait(SECONDS)

    def steps(lane: Lane) -> Steps[None]:
        yield from RunBlocking(lane, lambda: block(lane))

    async def scenario() -> None:
        tasks = [asyncio.create_task(driver.change(steps(lane))) for lane in Lane for _ in range(20)]
        while running != THREADS:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert running == THREADS
        release.set()
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    assert set(running.values()) == {20}
