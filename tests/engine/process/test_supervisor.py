"""Engines that die when the test says so, under a real supervisor; at the end, once, a real process."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes.engine_process import FakeEngineProcess
from fakes.models import make_adapter, make_tiny_model

from multilora.config import Config
from multilora.engine.messages import FlushCache, Output, Pause, StartProfile, Submit
from multilora.engine.process.supervisor import EngineSupervisor
from multilora.errors import AdapterNotFound, ConfigError, EngineDead, EngineRestarting
from multilora.params import SamplingParams

SECONDS = 20


class World:
    """A supervisor, and the engines that it has started. `starts`: errors of the next starts, None: it goes well."""

    def __init__(self) -> None:
        self.engines: list[FakeEngineProcess] = []
        self.starts: list[Exception | None] = []
        self.loads: dict[str, Any] = {}
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.told: dict[str, list[Output]] = {}
        self.supervisor: EngineSupervisor

    async def start(self, config: Config) -> FakeEngineProcess:
        await self.may_start.wait()
        if self.starts and (error := self.starts.pop(0)) is not None:
            raise error
        self.engines.append(FakeEngineProcess(self.loads))
        return self.engines[-1]

    @property
    def engine(self) -> FakeEngineProcess:
        return self.engines[-1]

    def submit(self, rid: str, *versions: int) -> list[Output]:
        told = self.told[rid] = []
        adapters = tuple((version, 1.0) for version in versions)
        message = Submit(rid=rid, input_ids=[1], sampling=SamplingParams(sampling_seed=7), adapters=adapters)
        self.supervisor.submit(message, told.append)
        return told

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():
                await asyncio.sleep(0)

    async def up(self, count: int) -> None:
        await self.until(lambda: len(self.engines) == count and not self.supervisor.restarting)


@contextlib.asynccontextmanager
async def world(**options: Any) -> AsyncIterator[World]:
    made = World()
    made.supervisor = await EngineSupervisor.start(Config.make(**options), made.start)  # type: ignore[arg-type]
    yield made
    await made.supervisor.shutdown()


def play(scenario: Callable[[World], Any], **options: Any) -> None:
    async def within() -> None:
        async with asyncio.timeout(SECONDS), world(**options) as made:
            await scenario(made)

    asyncio.run(within())


def test_streams_hear_at_once_and_everything_runs_again_with_its_seed() -> None:
    async def scenario(w: World) -> None:
        silent, streaming, ended = w.submit("silent"), w.submit("streaming"), w.submit("ended")
        w.engine.say("streaming", 5)
        w.engine.say("ended", 6, end=True)
        w.may_start.clear()
        w.engine.die()
        assert w.supervisor.alive and w.supervisor.restarting
        assert silent == [] and [o.again for o in streaming] == [False, True] and len(ended) == 1
        w.may_start.set()
        await w.up(2)
        assert sorted(w.engine.requests) == ["silent", "streaming"]
        assert w.engine.requests["silent"][0].sampling.sampling_seed == 7
        w.engine.say("silent", 8, end=True)
        assert [o.token_ids for o in silent] == [[8]]
        assert (w.supervisor.restarts, w.engines[0].closed) == (1, True)

    play(scenario)


def test_adapters_pauses_and_the_tokenizer_are_there_before_any_request() -> None:
    async def scenario(w: World) -> None:
        s = w.supervisor
        s.use_tokenizer("info")
        for version in (1, 2, 3):
            await s.load_adapter(version, f"/{version}", pinned=version == 2)
        await s.unload_adapter(1)
        await s.call(lambda call: Pause(call=call, mode="keep", queues=True))
        await s.call(FlushCache)
        told = w.submit("r", 2)
        w.engine.die()
        await w.until(lambda: len(w.engines) == 2)
        w.engine.gate.clear()
        await asyncio.sleep(0)
        assert w.engine.requests == {} and s.restarting
        w.engine.gate.set()
        await w.up(2)
        assert w.engine.loaded == {2: "/2", 3: "/3"}
        assert w.engine.tokenizer == "info"
        assert w.engine.calls == [Pause(call=1, mode="keep", queues=True)]
        assert list(w.engine.requests) == ["r"] and told == []

    play(scenario)


def test_an_adapter_that_is_gone_ends_only_its_own_requests_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("multilora.engine.process.supervisor.FIRST_RETRY_SECONDS", 0.01)

    async def scenario(w: World) -> None:
        for version in (1, 2, 3):
            await w.supervisor.load_adapter(version, f"/{version}", pinned=False)
        w.loads |= {"/1": AdapterNotFound("no such directory"), "/2": "other bytes"}
        before = w.submit("before", 1)
        w.engine.die()
        await w.up(2)
        changed, other = w.submit("changed", 2), w.submit("other", 3)
        for told, says in ((before, "no such directory"), (changed, "/2 has changed")):
            (output,) = told
            assert output.finished is not None and output.finished.kind == "AdapterUnavailable"
            assert says in output.finished.message
        assert other == [] and w.engine.loaded == {3: "/3"}
        await w.supervisor.unload_adapter(2)  # the engine does not know it
        del w.loads["/1"]
        await w.until(lambda: 1 in w.engine.loaded)
        await w.until(lambda: not w.supervisor._book.lost())
        w.submit("after", 1)
        assert "after" in w.engine.requests

    play(scenario)


def test_what_is_asked_while_there_is_no_engine() -> None:
    async def scenario(w: World) -> None:
        s = w.supervisor
        await s.load_adapter(1, "/1", pinned=False)
        gone, stopped = w.submit("gone"), w.submit("stopped")
        w.may_start.clear()
        w.engine.die()
        s.abort("gone", "the client left")
        s.finish("stopped")
        s.abort("unknown")
        assert [o.finished and o.finished.type for o in gone] == ["abort"] and stopped == []
        late = w.submit("late")
        with pytest.raises(EngineRestarting):
            await s.start_profile(StartProfile(path="p", activities=["CPU"]))
        waiting = [asyncio.create_task(work) for work in (s.load_adapter(2, "/2", False), s.unload_adapter(1))]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        w.may_start.set()
        await asyncio.gather(*waiting)
        assert w.engine.loaded == {2: "/2"} and list(w.engine.requests) == ["late"] and late == []

    play(scenario)


def test_a_call_in_the_middle_is_made_again_once() -> None:
    async def scenario(w: World) -> None:
        w.engine.gate.clear()
        load = asyncio.create_task(w.supervisor.load_adapter(1, "/1", pinned=False))
        await asyncio.sleep(0)
        w.engine.die()
        assert (await load).version == 1
        assert w.engine.loaded == {1: "/1"} and len(w.engines) == 2
        w.engine.gate.clear()
        unload = asyncio.create_task(w.supervisor.unload_adapter(1))
        await asyncio.sleep(0)
        w.engine.die()
        await unload
        await w.up(3)
        assert w.engine.loaded == {}, "an unload that has begun is not undone"

    play(scenario)


def test_a_load_that_ends_every_engine_is_given_up() -> None:
    async def scenario(w: World) -> None:
        w.engine.gate.clear()
        load = asyncio.create_task(w.supervisor.load_adapter(1, "/1", pinned=False))
        await asyncio.sleep(0)
        w.engine.die()
        await w.up(2)
        w.engine.gate.clear()
        await asyncio.sleep(0)
        w.engine.die()
        with pytest.raises(EngineDead):
            await load
        await w.up(3)

    play(scenario)


def test_an_engine_that_ends_while_it_is_being_restored_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multilora.engine.process.restarts.FIRST_PAUSE_SECONDS", 0.0)

    async def scenario(w: World) -> None:
        await w.supervisor.load_adapter(1, "/1", pinned=False)
        w.may_start.clear()
        w.engine.die()
        w.starts = [None, OSError("no memory"), ConfigError("the model is gone"), None]
        original = FakeEngineProcess.load_adapter

        async def dying(engine: FakeEngineProcess, *args: Any) -> Any:
            engine.die()
            raise EngineDead("the engine process ended")

        monkeypatch.setattr(FakeEngineProcess, "load_adapter", dying)
        w.may_start.set()
        await w.until(lambda: len(w.engines) == 2 and w.engine.closed)
        monkeypatch.setattr(FakeEngineProcess, "load_adapter", original)
        await w.up(3)
        assert w.engines[1].closed and w.engine.loaded == {1: "/1"}
        assert w.supervisor.restarts == 4

    play(scenario, max_engine_restarts=4)


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_are_the_end(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multilora.engine.process.restarts.FIRST_PAUSE_SECONDS", 0.0)

    async def scenario(w: World) -> None:
        told = w.submit("r")
        w.starts = [OSError("no memory")] * 5
        w.engine.die()
        await w.until(lambda: not w.supervisor.alive)
        assert not w.supervisor.restarting and w.supervisor.restarts == most
        (output,) = told
        assert output.finished is not None and output.finished.kind == "EngineDead"
        assert "restart the server" in output.finished.message
        assert ("no memory" in output.finished.message) == bool(most)
        assert [o.finished and o.finished.kind for o in w.submit("late")] == ["EngineDead"]
        for asked in (
            w.supervisor.load_adapter(1, "/1", False),
            w.supervisor.unload_adapter(1),
            w.supervisor.flush_cache(),
        ):
            with pytest.raises(EngineDead):
                await asked

    play(scenario, max_engine_restarts=most)


def test_a_shutdown_in_the_middle_of_a_restart() -> None:
    async def scenario(w: World) -> None:
        told = w.submit("r")
        w.may_start.clear()
        w.engine.die()
        await asyncio.sleep(0)
        await w.supervisor.shutdown()
        assert [o.finished and o.finished.kind for o in told] == ["EngineDead"]
        assert len(w.engines) == 1

    play(scenario)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGKILL, 2), (signal.SIGSTOP, 1)], ids=["killed", "stopped"])
def test_a_real_engine_comes_back_with_its_adapters(tmp_path: Path, number: signal.Signals, ranks: int) -> None:
    """And nothing of the one before it is left. One that is stopped is noticed within five seconds."""
    make_tiny_model(tmp_path / "model")
    make_adapter(tmp_path / "a", tmp_path / "model", r=4, target_modules=["q_proj"])
    config = Config.make(
        model_path=str(tmp_path / "model"), enable_lora=True, device="cpu", log_level="warning", tp_size=ranks
    )

    async def answer(s: EngineSupervisor, rid: str) -> list[int]:
        queue: asyncio.Queue[Output] = asyncio.Queue()
        sampling = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
        s.submit(Submit(rid=rid, input_ids=[1, 5, 9], sampling=sampling, adapters=((1, 1.0),)), queue.put_nowait)
        tokens: list[int] = []
        while True:
            output = await queue.get()
            tokens = [] if output.again else tokens + output.token_ids
            if output.finished is not None:
                assert output.finished.type == "length", output
                return tokens

    async def scenario() -> None:
        s = await EngineSupervisor.start(config)
        await s.load_adapter(1, str(tmp_path / "a"), pinned=True)
        right = await answer(s, "before")
        engine = psutil.Process(s._latest._process.pid)
        family = [engine, *engine.children(recursive=True)]
        assert len(family) >= ranks + 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        engine.send_signal(number)
        again = asyncio.create_task(answer(s, "again"))
        while not s.restarting:
            await asyncio.sleep(0.05)
        assert loop.time() - began < 5
        assert await again == right
        assert await answer(s, "after") == right
        assert [a.pinned for a in s.stats.adapters] == [True]
        assert not psutil.wait_procs(family, timeout=SECONDS)[1]
        await s.shutdown()

    asyncio.run(asyncio.wait_for(scenario(), 120))
