"""The device tier by itself: who leaves first, places in the table, limits."""

import weakref
from typing import Any

import pytest
import torch
from fakes.tiers import PAGE_BYTES, TARGET, FakeTiers

from multilora.adapters.device.residency import Fit, Residency
from multilora.adapters.host.cache import HostEntry
from multilora.lora.panels import AdapterShape
from multilora.memory.page_pool import PageKind


def make(**options: Any) -> FakeTiers:
    tiers = FakeTiers({}, **options)
    tiers.residency._on_evict = lambda version: None  # the store knows nothing of these versions
    return tiers


def entry(version: int, pages: int = 1) -> HostEntry:
    layout = TARGET.layout(AdapterShape(((8 * pages,),)))
    weights = torch.full((pages, PAGE_BYTES // 4), float(version))
    return HostEntry(layout, weights.view(torch.uint8))


def put(residency: Residency, version: int, pages: int = 1, *, pinned: bool = False) -> None:
    residency.start(version, entry(version, pages), pinned)
    assert residency.poll() == [version]
    residency.check()


def use(residency: Residency, *versions: int) -> None:
    for version in versions:
        residency.acquire(version)
        residency.release(version)


def order_of_leaving(residency: Residency) -> list[int]:
    gone = []
    while (version := residency._victim()) is not None:
        gone.append(version.version)
        residency.evict(0)
    return gone


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("lru", [3, 1, 4, 2]),  # by last use
        ("fifo", [1, 2, 3, 4]),  # by arrival, whatever happened since
        ("cost", [3, 4, 1, 2]),  # by number of uses; never used goes first
    ],
)
def test_who_leaves_first(policy, order):
    residency = make(policy=policy).residency
    for version in (1, 2, 3, 4):
        put(residency, version)
    use(residency, 1, 1, 4, 2, 2, 2)
    assert order_of_leaving(residency) == order


def test_cost_forgets_old_popularity():
    tiers = make(policy="cost")
    residency = tiers.residency
    put(residency, 1)
    use(residency, *[1] * 5)
    for version in range(2, 30):  # each is used twice; the floor rises as others give way
        put(residency, version)
        use(residency, version, version)
        tiers.reclaimer.ensure(tiers.pool.free + 1, 0)
    assert residency.get(1) is None


def test_a_tick_is_a_use_and_the_end_of_a_use():
    residency = make().residency
    put(residency, 1)
    put(residency, 2)
    residency.acquire(1)
    use(residency, 2)
    residency.release(1)
    assert order_of_leaving(residency) == [2, 1]


def test_in_use_pinned_and_being_copied_never_leave():
    tiers = make(copy_delay=lambda: 1)
    residency = tiers.residency
    residency.start(1, entry(1), False)
    residency.start(2, entry(2), True)
    residency.start(3, entry(3), False)
    assert residency.poll() == []
    assert residency.poll() == [1, 2, 3]
    residency.start(4, entry(4), False)
    residency.acquire(1)
    assert residency.in_use() == [1]
    assert residency.idle_pages() == 1
    assert order_of_leaving(residency) == [3]
    assert residency.peek_victim() is None


def test_evictions_are_told_and_free_the_pages():
    told = []
    tiers = make()
    residency = Residency(tiers.pool, tiers.clock, tiers.table, tiers.copier, on_evict=told.append)
    put(residency, 1, pages=3)
    assert tiers.pool.count(PageKind.ADAPTER) == residency.pages == 3
    assert residency.evict(0) == 3
    assert told == [1]
    assert tiers.pool.free == tiers.pool.total
    put(residency, 2)
    residency.remove(2, 0)
    assert told == [1], "an unload is no eviction"


def test_a_finished_copy_keeps_no_host_memory():
    """Else what the host tier has let go of would stay for as long as the adapter is resident."""
    residency, owned = make().residency, entry(1)
    kept = weakref.ref(owned.buffer)
    residency.start(1, owned, pinned=False)
    del owned
    assert kept() is not None
    assert residency.poll() == [1]
    assert kept() is None


def test_the_copy_that_is_under_way_keeps_what_it_reads(monkeypatch):
    """Another thread may put the entry elsewhere at any moment, and what it leaves is used for other adapters."""
    tiers, owned = make(), entry(1)
    read = weakref.ref(owned.buffer)
    start = tiers.copier.start

    def meanwhile(buffer, pages):
        copy = start(buffer, pages)
        owned.buffer = buffer.clone()
        return copy

    monkeypatch.setattr(tiers.copier, "start", meanwhile)
    assert tiers.residency.start(1, owned, pinned=False).buffer is read()
    assert read() is not None


def test_places_are_reused_and_show_the_new_weights():
    tiers = make()
    for version in (1, 2, 3):
        put(tiers.residency, version)
    slot = tiers.residency.get(2).slot
    tiers.residency.remove(2, 0)
    assert len(tiers.table) == 2
    put(tiers.residency, 4, pages=2)
    assert tiers.residency.get(4).slot == slot
    for version in (1, 3, 4):
        assert tiers.weights_are(version, tiers.residency.get(version).slot)
    assert sorted(tiers.residency.get(v).slot for v in (1, 3, 4)) == [0, 1, 2]


def test_freed_pages_carry_their_fence():
    tiers = make(total_pages=2)
    put(tiers.residency, 1, pages=2)
    tiers.residency.remove(1, fence=3)
    assert (tiers.pool.free, tiers.pool.ready) == (2, 0)


def test_room_and_make_room_by_count():
    tiers = make(max_loras_per_batch=2)
    residency, available = tiers.residency, tiers.reclaimer.available
    assert residency.room_for(1, available()) is Fit.YES
    put(residency, 1)
    put(residency, 2)
    assert residency.room_for(1, available()) is Fit.YES, "one can leave"
    residency.make_room(1, 0)
    assert residency.get(1) is None and len(residency) == 1
    put(residency, 3)
    residency.acquire(2)
    residency.acquire(3)
    assert residency.room_for(1, available()) is Fit.NO


def test_room_and_make_room_by_pages():
    tiers = make(max_device_pages=6)
    residency, available = tiers.residency, tiers.reclaimer.available
    for version in (1, 2, 3):
        put(residency, version, pages=2)
    residency.acquire(1)
    assert residency.room_for(4, available()) is Fit.YES
    assert residency.room_for(5, available()) is Fit.NO
    residency.make_room(3, 0)
    assert [v for v in (1, 2, 3) if residency.get(v)] == [1]
    assert residency.pages == 2


def test_no_room_when_the_arena_is_full_of_kv():
    tiers = make(total_pages=4)
    put(tiers.residency, 1)
    tiers.pool.alloc_kv(2)
    assert tiers.residency.room_for(2, tiers.reclaimer.available()) is Fit.YES
    assert tiers.residency.room_for(3, tiers.reclaimer.available()) is Fit.NO


def test_adapters_compete_with_prefix_pages():
    """A prefix page costs more to bring back than a page of an adapter that nobody used more often."""
    tiers = make(total_pages=4)
    put(tiers.residency, 1, pages=2)
    use(tiers.residency, 1)
    pages = tiers.pool.alloc_kv(1)
    tiers.prefix.insert([1, 2, 3, 4], pages, lambda _: 0, 0, fence=0)
    tiers.prefix.release(pages, 0)
    assert tiers.reclaimer.ensure(2, 0)
    assert tiers.residency.get(1) is None
    assert tiers.pool.count(PageKind.PREFIX) == 1
    assert tiers.reclaimer.ensure(4, 0)
    assert tiers.pool.count(PageKind.PREFIX) == 0


def test_check_finds_a_lost_place():
    tiers = make()
    put(tiers.residency, 1)
    tiers.residency.get(1).slot = 5
    with pytest.raises(AssertionError, match="slots"):
        tiers.residency.check()
