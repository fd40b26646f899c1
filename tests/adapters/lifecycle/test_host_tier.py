"""The host tier by itself."""

import torch

from multilora.adapters.host.cache import HostCache, HostEntry
from multilora.lora.panels import AdapterShape, PanelLayout


def entry(nbytes: int = 10, **flags: bool) -> HostEntry:
    return HostEntry(
        PanelLayout(1, AdapterShape(()), (), (), (), nbytes), torch.zeros(1, nbytes, dtype=torch.uint8), **flags
    )


def filled(max_count: int | None = None, max_bytes: int | None = None, **entries: HostEntry) -> HostCache:
    """`v1=entry(…)` puts version 1."""
    cache = HostCache(max_count, max_bytes)
    for name, item in entries.items():
        assert cache.put(int(name[1:]), item) == []
    return cache


def test_without_limits_everything_stays():
    cache = HostCache(None, None)
    for version in range(100):
        assert cache.put(version, entry()) == []
    assert len(cache) == 100 and cache.nbytes == 1000
    assert cache.has_room_for(10**6, 10**12)


def test_the_least_recently_used_gives_way_by_count():
    cache = filled(3, v1=entry(), v2=entry(), v3=entry())
    assert cache.get(1) is not None
    assert cache.peek(2) is not None  # looking is not using
    assert cache.put(4, entry()) == [2]
    assert cache.put(5, entry()) == [3]
    assert 1 in cache and 2 not in cache and cache.nbytes == 30


def test_as_many_give_way_as_the_bytes_need():
    cache = filled(None, 100, v1=entry(30), v2=entry(30), v3=entry(30))
    assert cache.put(4, entry(70)) == [1, 2]
    assert cache.nbytes == 100


def test_pinned_and_locked_stay():
    cache = filled(3, v1=entry(pinned=True), v2=entry(locked=True), v3=entry())
    assert cache.put(4, entry()) == [3]
    assert cache.put(5, entry()) == [4]


def test_what_was_under_way_may_overstep_and_the_next_makes_up_for_it():
    cache = filled(1, v1=entry(locked=True))
    assert cache.put(2, entry()) == []
    assert len(cache) == 2
    cache.peek(1).locked = False
    assert cache.put(3, entry()) == [1, 2]


def test_room_counts_what_cannot_leave():
    cache = filled(3, 100, v1=entry(40, pinned=True), v2=entry(30, locked=True), v3=entry(30))
    assert cache.has_room_for(1, 30)
    assert not cache.has_room_for(1, 31)
    assert cache.has_room_for(1, 60, ever=True)
    assert not cache.has_room_for(1, 61, ever=True)
    assert not cache.has_room_for(2, 0)
    assert cache.has_room_for(2, 0, ever=True)
    assert not cache.has_room_for(3, 0, ever=True)


def test_remove_is_idempotent():
    cache = filled(v1=entry(10), v2=entry(20))
    cache.remove(1)
    cache.remove(1)
    assert cache.get(1) is None and cache.nbytes == 20
