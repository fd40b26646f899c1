"""The host tier by itself."""

from typing import Any

import pytest
import torch

from multilora.adapters.host.mapping import HostEntry
from multilora.adapters.lifecycle.host_tier import HostTier
from multilora.adapters.lifecycle.version import AdapterVersion, DeviceEntry, State
from multilora.lora.panels import AdapterShape, PanelLayout


def add(tier: HostTier, version: int, nbytes: int = 10, **flags: Any) -> AdapterVersion:
    """A version that has just been fetched. flags: of AdapterVersion."""
    adapter = AdapterVersion(version, f"/{version}", flags.pop("pinned", False), state=State.FETCHING)
    layout = PanelLayout(1, AdapterShape(()), (), (), (), nbytes)
    tier.add(adapter, HostEntry(layout, torch.zeros(1, nbytes, dtype=torch.uint8)))
    adapter.move(State.ON_HOST)
    for name, value in flags.items():
        setattr(adapter, name, value)
    tier.check()
    return adapter


def bring_to_device(adapter: AdapterVersion, state: State) -> None:
    adapter.device = DeviceEntry(0, [0], 1, 1, 0.0)
    adapter.move(State.LOADING)
    if state is State.RESIDENT:
        adapter.move(state)


def test_without_limits_everything_stays():
    tier = HostTier(None, None)
    for version in range(100):
        add(tier, version)
    assert len(tier) == 100 and tier.nbytes == 1000
    assert tier.has_room_for(10**6, 10**12)


def test_the_least_recently_used_is_evicted_by_count():
    tier = HostTier(3, None)
    adapters = [add(tier, version) for version in (1, 2, 3)]
    tier.touch(adapters[0])
    add(tier, 4)
    assert tier.versions() == [3, 1, 4]
    add(tier, 5)
    assert tier.versions() == [1, 4, 5] and tier.nbytes == 30
    assert [a.state for a in adapters] == [State.ON_HOST, State.REGISTERED, State.REGISTERED]


def test_as_many_are_evicted_as_the_bytes_need():
    tier = HostTier(None, 100)
    for version in (1, 2, 3):
        add(tier, version, 30)
    add(tier, 4, 70)
    assert tier.versions() == [3, 4] and tier.nbytes == 100


@pytest.mark.parametrize("how", ["pinned", "claimed", "loading"])
def test_what_must_stay_stays(how):
    tier = HostTier(2, None)
    kept = add(tier, 1, pinned=how == "pinned", claimed=how == "claimed")
    if how == "loading":
        bring_to_device(kept, State.LOADING)
    for version in (2, 3, 4):
        add(tier, version)
    assert tier.versions() == [1, 4]


@pytest.mark.parametrize("flags", [{}, {"claimed": True}, {"refs": 1}])
def test_a_resident_adapter_needs_no_bytes_on_the_host(flags):
    tier = HostTier(1, None)
    resident = add(tier, 1)
    bring_to_device(resident, State.RESIDENT)
    for name, value in flags.items():
        setattr(resident, name, value)
    add(tier, 2)
    assert tier.versions() == [2]
    assert resident.state is State.RESIDENT and resident.host is None
    assert 1 in resident.changes


def test_what_was_under_way_may_overstep_and_the_next_makes_up_for_it():
    tier = HostTier(1, None)
    claimed = add(tier, 1, claimed=True)
    add(tier, 2)
    assert len(tier) == 2
    claimed.claimed = False
    add(tier, 3)
    assert tier.versions() == [3]


def test_room_counts_what_cannot_leave():
    tier = HostTier(3, 100)
    add(tier, 1, 40, pinned=True)
    claimed = add(tier, 2, 30, claimed=True)
    add(tier, 3, 30)
    assert tier.has_room_for(1, 30, [claimed])
    assert not tier.has_room_for(1, 31, [claimed])
    assert tier.has_room_for(1, 60)
    assert not tier.has_room_for(1, 61)
    assert not tier.has_room_for(2, 0, [claimed])
    assert tier.has_room_for(2, 0)
    assert not tier.has_room_for(3, 0)


def test_remove_is_idempotent():
    tier = HostTier(None, None)
    adapters = [add(tier, 1, 10), add(tier, 2, 20), add(tier, 3, 30, pinned=True)]
    for adapter in (adapters[0], adapters[0], adapters[2]):
        tier.remove(adapter)
        tier.check()
    assert tier.versions() == [2] and tier.nbytes == 20
