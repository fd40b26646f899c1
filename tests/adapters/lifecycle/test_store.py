"""The adapter store over fake files and slow copies: the way up, the way down, and what must wait for what.

Covers `lifecycle/fetch_queue.py`, `lifecycle/disabled.py` too.
"""

from typing import Any

import pytest
from fakes.tiers import FakeFile, FakeTiers

from multilora.adapters.lifecycle.store import Loaded, LoadStatus, Lost
from multilora.adapters.lifecycle.version import State
from multilora.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterNotLoaded,
    AdapterStarvation,
)

READY, COMING, BLOCKED = LoadStatus.READY, LoadStatus.COMING, LoadStatus.BLOCKED


def make(count: int = 4, *, rank: int = 8, **options: Any) -> FakeTiers:
    """Files /1 … /count; version v comes from /v. A page holds rank 8."""
    return FakeTiers({f"/{i}": FakeFile(rank=rank) for i in range(1, count + 1)}, **options)


def load(tiers: FakeTiers, version: int, *, pinned: bool = False, path: str | None = None) -> Loaded:
    """Load and wait for it."""
    tiers.store.load(version, path or f"/{version}", pinned)
    for _ in range(50):
        for event in poll(tiers):
            if isinstance(event, Loaded) and event.version == version:
                return event
    raise AssertionError("the load never ended")


def poll(tiers: FakeTiers) -> list[Loaded | Lost]:
    events = tiers.store.poll_loads(tiers.pool.completed)
    tiers.check()
    return events


def plan(tiers: FakeTiers, *versions: int) -> list[LoadStatus]:
    """As the scheduler asks for what its waiting requests need."""
    tiers.store.begin_plan()
    found = [tiers.store.request_load(version, tiers.pool.completed) for version in versions]
    tiers.check()
    return found


def state(tiers: FakeTiers, version: int) -> State:
    return tiers.store.get(version).state


def bring_in(tiers: FakeTiers, version: int) -> None:
    for _ in range(50):
        if plan(tiers, version) == [READY]:
            return
        poll(tiers)
    raise AssertionError(f"version {version} never came")


# ---------------------------------------------------------------------- the way up


def test_from_disk_to_host_to_device():
    tiers = make(fetch_delay=lambda: 1, copy_delay=lambda: 2)
    tiers.store.load(1, "/1", False)
    assert not tiers.store.known(1)
    assert poll(tiers) == [] and tiers.store.busy  # fetching begins
    assert poll(tiers) == []
    assert poll(tiers) == [Loaded(1)]
    assert tiers.store.known(1) and state(tiers, 1) is State.ON_HOST and not tiers.store.busy
    assert plan(tiers, 1) == [COMING]
    assert plan(tiers, 1) == [COMING]
    assert poll(tiers) == []
    assert plan(tiers, 1) == [COMING]
    assert poll(tiers) == []
    assert plan(tiers, 1) == [READY]
    assert tiers.weights_are(1, tiers.acquire(1))
    adapter = tiers.store.get(1)
    assert (adapter.fetches, adapter.loads, adapter.evictions, adapter.rank) == (1, 1, 0, 8)


def test_an_instant_copy_is_ready_in_the_same_plan():
    tiers = make()
    load(tiers, 1)
    assert plan(tiers, 1) == [READY]


def test_asking_again_starts_nothing_twice():
    tiers = make(fetch_delay=lambda: 5, copy_delay=lambda: 5, max_loaded_loras=1)
    load(tiers, 1)
    load(tiers, 2)
    for _ in range(20):
        plan(tiers, 1)
        poll(tiers)
    assert plan(tiers, 1) == [READY]
    assert tiers.copier.started == 1
    assert [job.version for job in tiers.loader.submitted] == [1, 2, 1]


@pytest.mark.parametrize("error", [AdapterInvalid("NaN"), AdapterNotFound("gone"), AdapterIncompatible("shape")])
def test_a_failed_first_load_changes_nothing(error):
    tiers = make()
    load(tiers, 1)
    tiers.loader.files["/2"].error = error
    ended = load(tiers, 2)
    assert type(ended.error) is type(error)
    assert ended.error.message == error.message
    assert [a.version for a in tiers.store.loaded()] == [1]
    assert tiers.host.versions() == [1]
    assert not tiers.store.known(2) and not tiers.store.busy
    tiers.loader.files["/2"].error = None
    assert load(tiers, 3, path="/2") == Loaded(3)


# ---------------------------------------------------------------------- the way down, and back


def test_host_eviction_and_silent_return():
    tiers = make(max_loaded_loras=2)
    for version in (1, 2, 3):
        assert load(tiers, version) == Loaded(version)
    assert state(tiers, 1) is State.REGISTERED and len(tiers.host) == 2
    assert tiers.store.known(1)
    assert plan(tiers, 1) == [COMING]
    assert poll(tiers) == []
    poll(tiers)
    assert plan(tiers, 1) == [READY]
    assert tiers.weights_are(1, tiers.store.get(1).slot)
    assert len(tiers.host) == 2
    assert tiers.store.get(1).fetches == 2


def test_the_least_recently_used_leaves_the_host():
    tiers = make(max_loaded_loras=2)
    load(tiers, 1)
    load(tiers, 2)
    plan(tiers, 1)
    load(tiers, 3)
    assert tiers.host.versions() == [1, 3]


def test_what_is_resident_needs_no_host_copy():
    tiers = make(max_loaded_loras=1)
    load(tiers, 1)
    bring_in(tiers, 1)
    load(tiers, 2)
    assert tiers.host.versions() == [2]
    assert plan(tiers, 1) == [READY]
    assert len(tiers.loader.submitted) == 2
    assert plan(tiers, 2) == [READY] and plan(tiers, 1) == [READY]


def test_changed_files_are_lost_not_served():
    tiers = make(max_loaded_loras=1)
    load(tiers, 1)
    load(tiers, 2)
    tiers.loader.files["/1"].fingerprint = "other weights"
    assert plan(tiers, 1) == [COMING]
    poll(tiers)
    (lost,) = poll(tiers)
    assert isinstance(lost, Lost) and lost.version == 1
    assert isinstance(lost.error, AdapterError) and "has changed" in lost.error.message
    assert tiers.host.versions() == [2]
    assert state(tiers, 1) is State.FAILED and tiers.store.known(1), "it may be asked for again"
    tiers.loader.files["/1"].fingerprint = "as written"
    bring_in(tiers, 1)


def test_device_eviction_and_return_without_a_fetch():
    tiers = make(max_loras_per_batch=1)
    load(tiers, 1)
    load(tiers, 2)
    bring_in(tiers, 1)
    bring_in(tiers, 2)
    assert state(tiers, 1) is State.ON_HOST
    assert tiers.store.get(1).evictions == 1
    bring_in(tiers, 1)
    assert tiers.store.get(1).loads == 2
    assert len(tiers.loader.submitted) == 2


def test_what_is_in_use_blocks():
    tiers = make(max_loras_per_batch=1)
    load(tiers, 1)
    load(tiers, 2)
    bring_in(tiers, 1)
    tiers.acquire(1)
    assert plan(tiers, 2) == [BLOCKED]
    assert tiers.store.get(1).evictions == 0
    tiers.release(1)
    assert plan(tiers, 2) == [READY]


def test_fenced_pages_are_waited_for():
    """Pages of a step that still runs must not be written by a copy."""
    tiers = make(total_pages=2, context_pages=0)
    load(tiers, 1)
    pages = tiers.pool.alloc_kv(2)
    tiers.pool.free_pages(pages, fence=7)
    assert tiers.store.request_load(1, 7) is COMING
    assert tiers.copier.started == 0
    tiers.pool.complete(7)
    assert tiers.store.request_load(1, 7) is READY


# ---------------------------------------------------------------------- limits


def test_device_limits_by_count_and_by_pages():
    for limit in ({"max_loras_per_batch": 2}, {"max_device_pages": 5}):
        tiers = make(rank=16, **limit)  # two pages each
        for version in range(1, 5):
            load(tiers, version)
            bring_in(tiers, version)
            assert len(tiers.device) <= 2
        assert tiers.resident() == [3, 4]


def test_host_limits_by_count_and_by_bytes():
    for limit in ({"max_loaded_loras": 2}, {"max_host_pages": 5}):
        tiers = make(rank=16, **limit)
        for version in range(1, 5):
            load(tiers, version)
        assert tiers.host.versions() == [3, 4]


def test_an_adapter_larger_than_a_limit_is_refused():
    for limit in ({"max_host_pages": 2}, {"max_device_pages": 2}, {"total_pages": 3}):
        tiers = make(rank=24, context_pages=1, **limit)
        ended = load(tiers, 1)
        assert isinstance(ended.error, AdapterIncompatible)
        assert not tiers.store.known(1)


def test_host_entries_that_a_copy_needs_hold_back_fetches_until_it_is_done():
    tiers = make(max_loaded_loras=1, copy_delay=lambda: 3)
    load(tiers, 1)
    load(tiers, 2)
    seen = []
    for _ in range(30):
        seen.append((plan(tiers, 2, 1), tiers.host.versions()))
        poll(tiers)
    assert seen[-1][0] == [READY, READY]
    assert all(len(held) <= 1 for _, held in seen)


@pytest.mark.parametrize("copy_delay", [0, 3])
@pytest.mark.parametrize("fetch_delay", [0, 3])
def test_many_adapters_through_a_host_tier_of_one(fetch_delay, copy_delay):
    """Several are wanted in every plan, in turn; each gets to run, however small the tiers are."""
    tiers = make(5, max_loaded_loras=1, max_loras_per_batch=1, fetch_delay=lambda: fetch_delay)
    for version in range(1, 6):
        assert load(tiers, version) == Loaded(version)
    tiers.copier.delay = lambda: copy_delay
    queue = [1, 2, 3, 4, 5] * 3
    served: list[int] = []
    running: list[list[int]] = []  # [steps left, version]
    for _ in range(400):
        poll(tiers)
        for job in [job for job in running if job[0] == 0]:
            running.remove(job)
            tiers.release(job[1])
        running = [[left - 1, version] for left, version in running]
        tiers.store.begin_plan()
        for version in list(queue):
            if tiers.store.request_load(version, 0) is READY:
                tiers.acquire(version)
                queue.remove(version)
                served.append(version)
                running.append([2, version])
        tiers.check()
        assert len(tiers.host) <= 2, "one over the limit at most: what was under way"
    assert sorted(served) == sorted([1, 2, 3, 4, 5] * 3)


def test_a_blocked_adapter_keeps_no_other_out_of_host_memory():
    """Two that wait for a slot on the device fill the host tier; a third comes nevertheless."""
    tiers = make(4, max_loaded_loras=2, max_loras_per_batch=1)
    load(tiers, 4)
    bring_in(tiers, 4)
    tiers.acquire(4)
    for version in (3, 1, 2):
        load(tiers, version)
    assert plan(tiers, 2, 1, 3) == [BLOCKED, BLOCKED, COMING]
    poll(tiers)
    poll(tiers)
    assert 3 in tiers.host.versions() and len(tiers.host) == 2
    assert plan(tiers, 3) == [BLOCKED]
    tiers.release(4)
    assert plan(tiers, 3) == [READY]


# ---------------------------------------------------------------------- pinned


def test_pinned_adapters_go_to_the_device_by_themselves_and_stay_in_both_tiers():
    tiers = make(max_loaded_loras=2, max_loras_per_batch=2)
    load(tiers, 1, pinned=True)
    poll(tiers)
    assert tiers.resident() == [1], "unasked"
    for version in (2, 3, 4, 2, 3):
        if not tiers.store.known(version):
            load(tiers, version)
        bring_in(tiers, version)
        assert 1 in tiers.host.versions() and 1 in tiers.resident()


def test_a_pinned_adapter_comes_as_soon_as_there_is_room():
    tiers = make(2, max_loras_per_batch=2, copy_delay=lambda: 1)
    tiers.loader.files["/large"] = FakeFile(rank=32)
    kv = tiers.pool.alloc_kv(13)
    assert load(tiers, 1, path="/large", pinned=True) == Loaded(1)
    for _ in range(3):
        poll(tiers)
    assert state(tiers, 1) is State.ON_HOST
    tiers.pool.free_pages(kv, tiers.pool.completed)
    for _ in range(3):
        poll(tiers)
    assert tiers.resident() == [1]


def test_the_last_slot_of_a_batch_cannot_be_pinned():
    tiers = make(max_loras_per_batch=2)
    assert load(tiers, 1, pinned=True) == Loaded(1)
    ended = load(tiers, 2, pinned=True)
    assert isinstance(ended.error, AdapterStarvation)
    assert "starvation" in ended.error.message and "--max-loras-per-batch" in ended.error.message
    assert load(tiers, 3) == Loaded(3)
    tiers.store.unload(1, 0)
    assert load(tiers, 4, path="/2", pinned=True) == Loaded(4)


def test_a_pin_must_leave_room_for_a_full_context_and_the_largest_adapter():
    tiers = make(3, rank=16, total_pages=10, context_pages=4)
    assert load(tiers, 1, pinned=True) == Loaded(1)  # 10 - 2 >= 4 + 2
    assert load(tiers, 2, pinned=True) == Loaded(2)  # 10 - 4 >= 4 + 2
    ended = load(tiers, 3, pinned=True)
    assert isinstance(ended.error, AdapterStarvation) and "full-context" in ended.error.message
    assert load(tiers, 4, path="/3") == Loaded(4)


def test_a_pin_must_leave_room_under_the_device_limit():
    tiers = make(3, rank=16, max_device_pages=5)
    assert load(tiers, 1, pinned=True) == Loaded(1)
    ended = load(tiers, 2, pinned=True)
    assert isinstance(ended.error, AdapterStarvation) and "--lora-device-bytes" in ended.error.message


def test_a_pin_must_leave_room_on_the_host_for_those_loaded_already():
    tiers = make(3, max_loaded_loras=2)
    load(tiers, 1)
    assert load(tiers, 2, pinned=True) == Loaded(2)
    ended = load(tiers, 3, pinned=True)
    assert isinstance(ended.error, AdapterStarvation) and "--max-loaded-loras" in ended.error.message
    bring_in(tiers, 1)


def test_the_whole_host_tier_may_be_pinned_while_nothing_else_is_loaded():
    tiers = make(3, max_loaded_loras=2)
    assert load(tiers, 1, pinned=True) == Loaded(1)
    assert load(tiers, 2, pinned=True) == Loaded(2)
    ended = load(tiers, 3)
    assert isinstance(ended.error, AdapterStarvation) and "pinned" in ended.error.message


def test_an_adapter_that_never_fits_beside_the_pinned_ones_is_refused():
    tiers = make(1, rank=16, max_device_pages=4)
    tiers.loader.files["/large"] = FakeFile(rank=24)
    assert load(tiers, 1, pinned=True) == Loaded(1)
    ended = load(tiers, 2, path="/large")
    assert isinstance(ended.error, AdapterIncompatible) and "--lora-device-bytes" in ended.error.message
    assert not tiers.store.known(2)


def test_pinned_bytes_on_the_host_refuse_what_comes_too_large():
    tiers = make(1, rank=16, max_host_pages=4)
    tiers.loader.files["/large"] = FakeFile(rank=24)
    load(tiers, 1, pinned=True)
    ended = load(tiers, 2, path="/large")
    assert isinstance(ended.error, AdapterIncompatible) and "--lora-host-bytes" in ended.error.message


# ---------------------------------------------------------------------- unload


def test_unload_frees_everything():
    tiers = make()
    load(tiers, 1, pinned=True)
    poll(tiers)
    tiers.store.unload(1, 0)
    assert tiers.pool.free == tiers.pool.total
    assert len(tiers.host) == 0 and len(tiers.table) == 0
    assert not tiers.store.known(1)
    with pytest.raises(AdapterNotLoaded):
        tiers.store.unload(1, 0)


def test_unload_of_what_is_still_loading_is_refused_and_the_load_ends_well():
    tiers = make(fetch_delay=lambda: 2)
    tiers.store.load(1, "/1", False)
    poll(tiers)
    with pytest.raises(AdapterNotLoaded):
        tiers.store.unload(1, 0)
    assert [e for _ in range(4) for e in poll(tiers)] == [Loaded(1)]


def test_unload_while_it_is_fetched_again():
    tiers = make(max_loaded_loras=1, fetch_delay=lambda: 2)
    load(tiers, 1)
    load(tiers, 2)
    plan(tiers, 1)
    poll(tiers)
    tiers.store.unload(1, 0)
    for _ in range(5):
        assert poll(tiers) == []
    assert not tiers.store.busy
    assert tiers.host.versions() == [2]


def test_unload_while_it_waits_to_be_fetched_again():
    tiers = make(max_loaded_loras=1, fetch_delay=lambda: 2)
    load(tiers, 1)
    load(tiers, 2)
    plan(tiers, 1)
    tiers.store.unload(1, 0)
    assert not tiers.store.busy
    assert poll(tiers) == []


def test_unload_while_it_is_copied():
    tiers = make(copy_delay=lambda: 2)
    load(tiers, 1)
    plan(tiers, 1)
    tiers.store.unload(1, 0)
    assert state(tiers, 1) is State.DRAINING and len(tiers.host) == 0
    assert tiers.pool.free == tiers.pool.total - 1, "the copy still writes to its page"
    poll(tiers)
    poll(tiers)
    assert tiers.pool.free == tiers.pool.total
    assert len(tiers.device) == 0


# ---------------------------------------------------------------------- numbers


def test_slots():
    tiers = make(rank=16, total_pages=12)
    assert tiers.store.slots() == (0, 0)
    load(tiers, 1)
    assert tiers.store.slots() == (0, 6)
    bring_in(tiers, 1)
    assert tiers.store.slots() == (1, 6)
    assert make(max_loras_per_batch=3).store.slots() == (0, 3)
