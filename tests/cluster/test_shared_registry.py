"""The registry of a cluster: who is waited for, what is refused, what outlasts it.

Covers `shared_registry.py`, `cluster_table.py`.
"""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.cluster import shared_registry
from multilora.cluster.cluster_table import ClusterTable
from multilora.cluster.shared_registry import SharedRegistry
from multilora.errors import AdapterAlreadyLoaded, AdapterError, AdapterNotLoaded
from multilora.front.records import AdapterRecord, Records
from multilora.front.state_directory import StateDirectory
from multilora.lora_path import LoraPath


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class World:
    """A registry, and members that ask it for changes when they are told to."""

    def __init__(self, state=None, startup=(), **options):
        self.dead, self.clock = set(), Clock()
        self.tables = {}
        state = state or Records()
        self.registry = SharedRegistry(state, startup, self._is_dead, clock=self.clock, lease=20.0, **options)

    async def _is_dead(self, name):
        return name in self.dead

    async def join(self, name):
        table = self.tables[name] = ClusterTable()
        table.apply(await self.registry.join(name))

    async def ask(self, name, wait=0.0):
        """One question; what the member has applied until then is what it goes by."""
        change = await self.registry.changes(name, self.tables[name].seq, wait)
        if change is not None:
            self.tables[name].apply(change)
        return change


def record(name, path="/a", **fields):
    return AdapterRecord(name=name, version=0, path=path, **fields)


async def settle(task):
    for _ in range(20):
        await asyncio.sleep(0.005)
    return task.done()


def run(test):
    asyncio.run(asyncio.wait_for(test, 30))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(shared_registry, "PROBE_SECONDS", 0.02)


def test_a_change_returns_once_everybody_goes_by_it():
    async def test():
        world = World()
        for name in "ab":
            await world.join(name)
        saving = asyncio.create_task(world.registry.save(record("sql"), replace=False))
        assert not await settle(saving)
        await world.ask("a")
        assert world.tables["a"].version_of("sql") == 1
        await world.ask("a")
        await world.ask("b")
        assert not await settle(saving)  # b has it, but has not said so
        await world.ask("b")
        assert await saving == 1

    run(test())


def test_whoever_waits_for_a_change_gets_it_at_once():
    async def test():
        world = World()
        await world.join("a")
        waiting = asyncio.create_task(world.ask("a", wait=10.0))
        await asyncio.sleep(0.01)
        saving = asyncio.create_task(world.registry.save(record("sql"), replace=False))
        change = await asyncio.wait_for(waiting, 2)
        assert [one.name for one in change.records] == ["sql"]
        await world.ask("a")
        await saving

    run(test())


def test_a_dead_replica_is_not_waited_for_and_a_silent_one_until_its_lease_ends():
    async def test():
        world = World()
        for name in "abc":
            await world.join(name)
        world.dead.add("a")
        saving = asyncio.create_task(world.registry.save(record("sql"), replace=False))
        await settle(saving)
        await world.ask("c")
        await world.ask("c")
        world.clock.now += 1
        assert not await settle(saving)
        world.clock.now += 20
        await world.ask("c")
        assert await asyncio.wait_for(saving, 2) == 1
        assert await world.registry.members() == ["c"]
        change = await world.ask("b")  # it comes back
        assert change.whole and world.tables["b"].version_of("sql") == 1

    run(test())


def test_the_dead_are_no_members_for_long():
    async def test():
        world = World()
        for name in "ab":
            await world.join(name)
        world.dead.add("a")
        assert await world.registry.members() == ["a", "b"]
        world.clock.now += 11
        assert await world.registry.members() == ["b"]

    run(test())


def test_one_that_has_left_is_not_waited_for():
    async def test():
        world = World()
        await world.join("a")
        removing = asyncio.create_task(world.registry.save(record("sql"), replace=False))
        await asyncio.sleep(0.01)
        await world.registry.leave("a")
        await asyncio.wait_for(removing, 2)

    run(test())


def test_names_are_taken_replaced_and_gone():
    async def test():
        world = World()
        registry = world.registry
        assert await registry.save(record("a"), replace=False) == 1
        with pytest.raises(AdapterAlreadyLoaded):
            await registry.save(record("a"), replace=False)
        assert await registry.save(record("a", "/b"), replace=True) == 2
        with pytest.raises(AdapterError, match="unloaded meanwhile"):
            await registry.save(record("mix", parts=(("a", 1.0), ("b", 1.0))), replace=False)
        await registry.save(record("mix", parts=(("a", 0.5),)), replace=False)
        with pytest.raises(AdapterError, match="part of composition 'mix'"):
            await registry.remove("a")
        await registry.remove("mix")
        await registry.remove("a")
        with pytest.raises(AdapterNotLoaded):
            await registry.remove("a")
        assert await registry.save(record("a"), replace=False) == 4

    run(test())


def test_it_outlasts_its_process(tmp_path: Path):
    startup = [LoraPath("first", "/first", True), LoraPath("second", "/second")]

    async def before():
        state = StateDirectory(tmp_path)
        world = World(state, startup)
        await world.registry.save(record("a", "/a", pinned=True, fingerprint="f"), replace=False)
        await world.registry.save(record("a", "/b"), replace=True)
        await world.registry.remove("second")
        await world.registry.label_weights("step-7")
        state.close()

    async def after():
        state = StateDirectory(tmp_path)
        world = World(state, startup, restarted=True, first=1000)
        await world.join("m")
        table = world.tables["m"]
        assert {name: one.path for name, one in table.records.items()} == {"a": "/b", "first": "/first"}
        assert table.records["first"].pinned and table.weight_version == "step-7" and table.seq == 1000
        saving = asyncio.create_task(world.registry.save(record("c"), replace=False))
        await settle(saving)
        await world.ask("m")
        await world.ask("m")
        assert not await settle(saving)  # there may be others, whose leases run
        world.clock.now += 21
        await world.ask("m")
        assert await asyncio.wait_for(saving, 2) > table.version_of("a")
        state.close()

    run(before())
    run(after())


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.sampled_from("xyz")), max_size=40),
    st.integers(2, 6),
)
@settings(max_examples=40, deadline=None)
def test_whoever_asks_has_the_names_as_they_are_however_far_behind(steps, kept):
    async def test():
        world = World()
        world.registry._log = shared_registry.deque(maxlen=kept)
        watchers = {name: ClusterTable() for name in "xyz"}
        for name, put, watcher in steps:
            if put:
                await world.registry.save(record(name), replace=True)
            elif name in world.registry._table.records:
                await world.registry.remove(name)
            change = await world.registry.changes(None, watchers[watcher].seq, 0.0)
            if change is not None:
                watchers[watcher].apply(change)
            assert watchers[watcher].records == world.registry._table.records

    run(test())
