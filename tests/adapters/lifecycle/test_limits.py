"""Limits of the device tier that change while the engine runs. (Limits set at start: test_store.py.)"""

from typing import Any

import pytest
from fakes.tiers import PAGE_BYTES, FakeFile, FakeTiers

from multilora.adapters.lifecycle.store import LoadStatus
from multilora.errors import ConfigError


def make(resident: int, *, rank: int = 8, pinned: int = 0, **options: Any) -> FakeTiers:
    """Versions 1 … `resident`, on the device; the first `pinned` of them pinned. A page holds rank 8."""
    tiers = FakeTiers({f"/{i}": FakeFile(rank=rank) for i in range(1, resident + 1)}, **options)
    for version in range(1, resident + 1):
        tiers.store.load(version, f"/{version}", version <= pinned)
    while tiers.store.busy:
        poll(tiers)
    for version in range(1, resident + 1):
        assert request(tiers, version) is LoadStatus.READY
    return tiers


def poll(tiers: FakeTiers) -> None:
    tiers.store.poll_loads(0)
    tiers.check()


def request(tiers: FakeTiers, version: int) -> LoadStatus:
    tiers.store.begin_plan()
    found = tiers.store.request_load(version, 0)
    tiers.check()
    return found


def set_limits(tiers: FakeTiers, pages: int | None = None, count: int | None = None) -> None:
    device_bytes = None if pages is None else pages * PAGE_BYTES
    tiers.store.set_limits(device_bytes=device_bytes, max_count=count, fence=0)
    tiers.check()


@pytest.mark.parametrize("limit", [{"pages": 4}, {"count": 2}])
def test_idle_adapters_are_evicted_at_once_the_least_recently_used_first(limit):
    tiers = make(4, rank=16)
    tiers.acquire(1)
    tiers.release(1)
    set_limits(tiers, **limit)
    assert tiers.resident() == [1, 4]
    assert request(tiers, 2) is LoadStatus.READY
    assert tiers.resident() == [1, 2]


@pytest.mark.parametrize("limit", [{"pages": 1}, {"count": 1}])
def test_adapters_in_use_are_evicted_when_their_requests_have_ended(limit):
    tiers = make(3)
    for version in (1, 2):
        tiers.acquire(version)
    set_limits(tiers, **limit)
    assert tiers.resident() == [1, 2], "only the idle one could go"
    assert request(tiers, 3) is LoadStatus.BLOCKED
    tiers.release(1)
    poll(tiers)
    assert tiers.resident() == [2]
    assert request(tiers, 3) is LoadStatus.BLOCKED
    tiers.release(2)
    poll(tiers)
    assert tiers.resident() == [2], "one fits"
    assert request(tiers, 3) is LoadStatus.READY


def test_limits_are_lifted():
    tiers = make(4, max_device_pages=4)
    set_limits(tiers, pages=1)
    assert tiers.resident() == [4]
    set_limits(tiers)
    assert [request(tiers, version) for version in (1, 2, 3, 4)] == [LoadStatus.READY] * 4
    assert tiers.resident() == [1, 2, 3, 4]


def test_a_new_limit_holds_for_adapters_that_come_later():
    tiers = make(1)
    set_limits(tiers, pages=1)
    tiers.loader.files["/9"] = FakeFile(rank=16)
    tiers.store.load(9, "/9", False)
    poll(tiers)
    [event] = [e for _ in range(3) for e in tiers.store.poll_loads(0)]
    assert event.error.kind == "AdapterIncompatible"


@pytest.mark.parametrize(
    ("limit", "least"),
    [
        ({"pages": 0}, "at least 2048"),
        ({"pages": 1}, "at least 2048"),
        ({"count": 0}, "at least 1"),
    ],
)
def test_a_limit_under_which_a_loaded_adapter_could_never_run_is_refused(limit, least):
    tiers = make(3, rank=16)
    with pytest.raises(ConfigError, match=least):
        set_limits(tiers, **limit)
    assert tiers.resident() == [1, 2, 3]


def test_a_limit_that_only_the_pinned_ones_would_fill_is_refused():
    tiers = make(3, rank=16, pinned=2)
    with pytest.raises(ConfigError, match="--max-loras-per-batch 2: must be at least 3"):
        set_limits(tiers, count=2)
    with pytest.raises(ConfigError, match="--lora-device-bytes 5120: must be at least 6144"):
        set_limits(tiers, pages=5)
    set_limits(tiers, pages=6, count=3)
    assert tiers.resident() == [1, 2, 3]
