"""The device tier by itself: which adapter is evicted first, slots in the table, limits.

Covers `device/eviction.py` too.
"""

import weakref

import pytest
import torch
from fakes.tiers import PAGE_BYTES, TARGET, FakeTiers

from multilora.adapters.host.mapping import HostEntry
from multilora.adapters.lifecycle.device_tier import DeviceTier
from multilora.adapters.lifecycle.version import AdapterVersion, State
from multilora.lora.panels import AdapterShape
from multilora.memory.page_pool import PageKind


def on_host(version: int, pages: int = 1, *, pinned: bool = False) -> AdapterVersion:
    layout = TARGET.layout(AdapterShape(((8 * pages,),)))
    weights = torch.full((pages, PAGE_BYTES // 4), float(version))
    entry = HostEntry(layout, weights.view(torch.uint8))
    return AdapterVersion(version, f"/{version}", pinned, state=State.ON_HOST, host=entry, layout=layout)


def put(device: DeviceTier, version: int, pages: int = 1, *, pinned: bool = False) -> AdapterVersion:
    """A copy that is done at once."""
    adapter = on_host(version, pages, pinned=pinned)
    device.start_copy(adapter)
    assert device.poll_copies() == [adapter]
    device.check()
    return adapter


def use(device: DeviceTier, *adapters: AdapterVersion) -> None:
    for adapter in adapters:
        device.acquire_slot(adapter)
        device.release_slot(adapter)


def evict_all(device: DeviceTier) -> list[int]:
    """Versions in the order of their eviction."""
    evicted = []
    while (victim := device._victim()) is not None:
        evicted.append(victim.version)
        device.evict(0)
        device.check()
    return evicted


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("lru", [3, 1, 4, 2]),  # by last use
        ("fifo", [1, 2, 3, 4]),  # by arrival, whatever happened since
        ("cost", [3, 4, 1, 2]),  # by number of uses; never used goes first
    ],
)
def test_the_policy_chooses_the_victim(policy, order):
    device = FakeTiers({}, policy=policy).device
    one, two, _, four = (put(device, version) for version in (1, 2, 3, 4))
    use(device, one, one, four, two, two, two)
    assert evict_all(device) == order


def test_cost_forgets_old_popularity():
    tiers = FakeTiers({}, policy="cost")
    first = put(tiers.device, 1)
    use(tiers.device, *[first] * 5)
    for version in range(2, 30):  # each is used twice; the floor rises with every eviction
        adapter = put(tiers.device, version)
        use(tiers.device, adapter, adapter)
        tiers.reclaimer.ensure(tiers.pool.free + 1, 0)
    assert first.state is State.ON_HOST


def test_the_beginning_and_the_end_of_a_use_both_count_as_one():
    device = FakeTiers({}).device
    one, two = put(device, 1), put(device, 2)
    device.acquire_slot(one)
    use(device, two)
    device.release_slot(one)
    assert evict_all(device) == [2, 1]


def test_what_must_stay_is_never_evicted():
    tiers = FakeTiers({}, copy_delay=lambda: 1)
    device = tiers.device
    in_use, pinned, idle, claimed = on_host(1), on_host(2, pinned=True), on_host(3), on_host(4)
    for adapter in (in_use, pinned, idle, claimed):
        device.start_copy(adapter)
    assert device.poll_copies() == []
    assert device.idle_pages() == 0
    assert device.poll_copies() == [in_use, pinned, idle, claimed]
    device.start_copy(copying := on_host(5))
    device.acquire_slot(in_use)
    claimed.claimed = True
    device.refile(claimed)
    reasons = [adapter.keep_reason() for adapter in (in_use, pinned, idle, claimed, copying)]
    assert reasons == ["in use", "pinned", "", "asked for in this plan", "being copied"]
    assert device.idle_pages() == 1
    assert evict_all(device) == [3]
    assert device.peek_victim() is None


def test_what_a_waiting_request_will_ask_for_is_evicted_last():
    device = FakeTiers({}).device
    first, *_ = (put(device, version, version) for version in (1, 2))
    device.count_demand(first, 1)
    assert not device.has_room_for(4, 4)
    assert device.has_room_for(4, 4, urgent=True)
    assert evict_all(device) == [2, 1]
    first = put(device, 3)
    for change in (1, -1):
        device.count_demand(first, change)
    assert device.has_room_for(4, 4)


def test_evictions_are_told_and_free_the_pages():
    told = []
    tiers = FakeTiers({})
    device = DeviceTier(tiers.pool, tiers.clock, tiers.table, tiers.copier, on_evict=told.append)
    adapter = put(device, 1, pages=3)
    assert tiers.pool.count(PageKind.ADAPTER) == device.pages == 3
    assert device.evict(0) == 3
    assert told == [1] and adapter.evictions == 1
    assert tiers.pool.free == tiers.pool.total
    device.remove(put(device, 2), 0)
    assert told == [1], "an unload is no eviction"


def test_an_adapter_whose_bytes_have_left_the_host_is_registered_after_its_eviction():
    device = FakeTiers({}).device
    adapter = put(device, 1)
    adapter.host = None
    device.evict(0)
    assert adapter.state is State.REGISTERED


def test_a_finished_copy_keeps_no_host_memory():
    """Else what the host tier has evicted would stay for as long as the adapter is resident."""
    device, adapter = FakeTiers({}).device, on_host(1)
    kept = weakref.ref(adapter.host.buffer)
    device.start_copy(adapter)
    adapter.host = None
    assert kept() is not None
    assert device.poll_copies() == [adapter]
    assert kept() is None


def test_the_copy_that_is_under_way_keeps_what_it_reads(monkeypatch):
    """Another thread may put the entry elsewhere at any moment, and what it leaves is used for other adapters."""
    tiers, adapter = FakeTiers({}), on_host(1)
    read = weakref.ref(adapter.host.buffer)
    start_copy = tiers.copier.start_copy

    def meanwhile(buffer, pages, table):
        copy = start_copy(buffer, pages)
        adapter.host.buffer = buffer.clone()
        return copy

    monkeypatch.setattr(tiers.copier, "start_copy", meanwhile)
    tiers.device.start_copy(adapter)
    assert read() is not None
    assert tiers.device.poll_copies() == [adapter]
    assert read() is None


def test_slots_are_reused_and_show_the_new_weights():
    tiers = FakeTiers({})
    one, two, three = (put(tiers.device, version) for version in (1, 2, 3))
    slot = two.slot
    tiers.device.remove(two, 0)
    assert len(tiers.table) == 2
    four = put(tiers.device, 4, pages=2)
    assert four.slot == slot
    for adapter in (one, three, four):
        assert tiers.weights_are(adapter.version, adapter.slot)
    assert sorted(adapter.slot for adapter in (one, three, four)) == [0, 1, 2]


def test_freed_pages_carry_their_fence():
    tiers = FakeTiers({}, total_pages=2)
    tiers.device.remove(put(tiers.device, 1, pages=2), fence=3)
    assert (tiers.pool.free, tiers.pool.ready) == (2, 0)


def test_room_by_count():
    tiers = FakeTiers({}, max_loras_per_batch=2)
    device, available = tiers.device, tiers.reclaimer.available
    assert device.has_room_for(1, available())
    one, two = put(device, 1), put(device, 2)
    assert device.has_room_for(1, available()), "one can be evicted"
    device.make_room(1, 0)
    assert one.state is State.ON_HOST and len(device) == 1
    for adapter in (two, put(device, 3)):
        device.acquire_slot(adapter)
    assert not device.has_room_for(1, available())


def test_room_by_pages():
    tiers = FakeTiers({}, max_device_pages=6)
    device, available = tiers.device, tiers.reclaimer.available
    adapters = [put(device, version, pages=2) for version in (1, 2, 3)]
    device.acquire_slot(adapters[0])
    assert device.has_room_for(4, available())
    assert not device.has_room_for(5, available())
    device.make_room(3, 0)
    assert [adapter.state for adapter in adapters] == [State.RESIDENT, State.ON_HOST, State.ON_HOST]
    assert device.pages == 2


def test_no_room_when_the_arena_is_full_of_kv():
    tiers = FakeTiers({}, total_pages=4)
    put(tiers.device, 1)
    tiers.pool.alloc_kv(2)
    assert tiers.device.has_room_for(2, tiers.reclaimer.available())
    assert not tiers.device.has_room_for(3, tiers.reclaimer.available())


def test_adapters_compete_with_prefix_pages():
    """A prefix page costs more to bring back than a page of an adapter that no request used more often."""
    tiers = FakeTiers({}, total_pages=4)
    adapter = put(tiers.device, 1, pages=2)
    use(tiers.device, adapter)
    pages = tiers.pool.alloc_kv(1)
    tiers.prefix.insert([1, 2, 3, 4], pages, lambda _: 0, 0, fence=0)
    tiers.prefix.release(pages, 0)
    assert tiers.reclaimer.ensure(2, 0)
    assert adapter.state is State.ON_HOST
    assert tiers.pool.count(PageKind.PREFIX) == 1
    assert tiers.reclaimer.ensure(4, 0)
    assert tiers.pool.count(PageKind.PREFIX) == 0


def test_check_finds_a_lost_slot():
    tiers = FakeTiers({})
    put(tiers.device, 1).device.slot = 5
    with pytest.raises(AssertionError, match="slots"):
        tiers.device.check()
