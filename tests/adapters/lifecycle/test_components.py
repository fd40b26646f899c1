"""All adapters of a composition, or none: no request waits for ever, none keeps a slot for nothing."""

from typing import Any

import pytest
from fakes.tiers import PAGE_BYTES, FakeFile, FakeTiers

from multilora.adapters.lifecycle.components import Components
from multilora.adapters.lifecycle.disabled import DisabledStore
from multilora.adapters.lifecycle.store import LoadStatus
from multilora.errors import CannotFit, LoraNotEnabled
from multilora.memory.page_pool import PagePool
from multilora.memory.page_table import KVPages
from multilora.memory.prefix_cache import PrefixCache
from multilora.memory.reclaim import GdsfClock, Reclaimer


class World:
    """Adapters 1 to 5 of one page each, and 6 of four, on host."""

    def __init__(self, **options: Any):
        files = {f"/{v}": FakeFile(rank=8) for v in range(1, 6)} | {"/6": FakeFile(rank=32)}
        self.tiers = FakeTiers(files, **({"total_pages": 12} | options))
        self.components = Components(
            self.tiers.store, KVPages(self.tiers.pool, self.tiers.prefix, self.tiers.reclaimer, PAGE_BYTES)
        )
        for version in range(1, 7):
            self.tiers.store.load(version, f"/{version}", pinned=False)
        self.settle()

    def settle(self) -> None:
        while self.tiers.store.busy:
            self.tiers.store.poll_loads(0)

    def request(self, *versions: int) -> LoadStatus:
        return self.components.request_load(versions, 0)

    def plan(self) -> None:
        self.tiers.store.poll_loads(0)
        self.components.begin_plan()

    @property
    def resident(self) -> set[int]:
        return set(self.tiers.resident())


def test_base_asks_for_nothing():
    """LoRA may be off: there is no adapter then, and the same checks hold."""
    pool = PagePool(4)
    kv = KVPages(pool, PrefixCache(pool, GdsfClock(), 4), Reclaimer(pool, GdsfClock(), []), PAGE_BYTES)
    components = Components(DisabledStore(), kv)
    components.begin_plan()
    assert components.request_load((), 0) is LoadStatus.READY
    assert components.ready(()) and components.slots(()) == ()
    components.check_fit((), 16)
    with pytest.raises(CannotFit, match="need 5 pages of 4 tokens; 4 of 4 are not pinned"):
        components.check_fit((), 17)
    with pytest.raises(LoraNotEnabled, match="LoRA is not enabled"):
        components.request_load((1,), 0)


@pytest.mark.parametrize("policy", ["lru", "fifo", "cost"])
def test_parts_do_not_push_each_other_out(policy):
    """Two slots, both taken by others that look more worth keeping than what has just come."""
    world = World(max_loras_per_batch=2, policy=policy)
    for version in (3, 1):
        assert world.request(version) is LoadStatus.READY
        for _ in range(5):
            world.components.acquire_slots((version,))
            world.components.release_slots((version,))
    world.plan()
    assert world.request(1, 2) is LoadStatus.READY
    assert world.resident == {1, 2}
    world.tiers.check()


def test_nothing_comes_until_all_can():
    world = World(max_loras_per_batch=2)
    world.request(3)
    world.components.acquire_slots((3,))
    world.plan()
    assert world.request(1, 2) is LoadStatus.BLOCKED
    assert world.resident == {3}
    world.components.release_slots((3,))
    world.plan()
    assert world.request(1, 2) is LoadStatus.READY


def test_what_is_blocked_keeps_nothing_from_others():
    world = World(max_loras_per_batch=3)
    for version in (1, 3, 4):
        world.request(version)
    world.components.acquire_slots((3, 4))
    world.plan()
    assert world.request(1, 2) is LoadStatus.BLOCKED  # one slot could be made free, that of 1 itself
    assert world.request(5) is LoadStatus.READY
    assert world.resident == {3, 4, 5}


def test_a_part_that_is_there_waits_for_the_others_within_a_plan():
    world = World(max_loras_per_batch=2, copy_delay=lambda: 2)
    for _ in range(4):
        world.plan()
        world.request(1)
    world.plan()
    assert world.request(1, 2) is LoadStatus.COMING
    assert world.request(3) is LoadStatus.BLOCKED  # neither 1 nor 2 is evicted for a younger request
    for _ in range(4):
        world.plan()
        found = world.request(1, 2)
    assert found is LoadStatus.READY


def test_parts_that_are_not_on_host_are_fetched_while_blocked():
    world = World(max_loras_per_batch=2, max_loaded_loras=2)
    for version in (3, 4):
        while world.request(version) is not LoadStatus.READY:
            world.plan()
    world.components.acquire_slots((3, 4))
    fetches = world.tiers.store.get(1).fetches
    for _ in range(4):
        world.plan()
        assert world.request(1, 2) is LoadStatus.BLOCKED
    assert world.tiers.store.get(1).fetches == fetches + 1
    assert 1 in world.tiers.host.versions()


def test_slots():
    world = World()
    world.request(1, 2, 5)
    slots = world.components.slots((1, 2, 5))
    assert len(set(slots)) == 3
    assert all(world.tiers.weights_are(v, slot) for v, slot in zip((1, 2, 5), slots, strict=True))


@pytest.mark.parametrize(
    ("options", "versions", "tokens", "message"),
    [
        ({}, (), 49, r"need 13 pages of 4 tokens; 12 of 12 are not pinned"),
        ({}, (1, 2), 41, r"need 13 pages"),
        ({"max_loras_per_batch": 2}, (1, 2, 3), 1, r"3 adapters: --max-loras-per-batch 2 .* leave room for 2"),
        ({"max_device_pages": 4}, (1, 6), 1, r"5 pages of adapters; --lora-device-bytes .* leave 4"),
    ],
)
def test_what_could_never_run(options, versions, tokens, message):
    world = World(**options)
    with pytest.raises(CannotFit, match=message):
        world.components.check_fit(versions, tokens)
    world.components.check_fit(versions[:-1], min(tokens, 40))


def test_pinned_parts_count_once():
    world = World(max_loras_per_batch=3)
    world.tiers.store.unload(1, 0)
    world.tiers.store.load(7, "/1", pinned=True)
    world.settle()
    world.components.check_fit((2, 3, 7), 4)
    with pytest.raises(CannotFit, match="leave room for 2 that are not pinned"):
        world.components.check_fit((2, 3, 4), 4)
