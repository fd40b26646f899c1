"""The device tier: which adapter versions lie in the arena, and which of them is evicted first.

An adapter takes whole pages of the one arena at its true rank. `max_count` and `max_pages` are limits, nothing is
reserved. Idle adapters compete with idle prefix pages for the pool (`memory/reclaim.py`). What is idle is counted as
it changes; only the choice of a victim looks at all idle residents.
"""

from collections.abc import Callable, Collection
from time import monotonic

from multilora.adapters.device.copier import Copier, CopyInFlight
from multilora.adapters.device.eviction import EVICTION_POLICIES
from multilora.adapters.device.forecast import CopyForecast
from multilora.adapters.lifecycle.version import AdapterVersion, DeviceEntry, State
from multilora.lora.table import TableWriter
from multilora.memory.page_pool import PagePool
from multilora.memory.reclaim import ADAPTER_PAGE_COST, GdsfClock

DEMANDED_SCORE = 64 * ADAPTER_PAGE_COST
"""On top, for an adapter that a waiting request will ask for: as if it had been used as often as counts at all."""


class _Idle:
    """Idle residents and the sum of their pages."""

    def __init__(self) -> None:
        self.adapters: dict[int, AdapterVersion] = {}
        self.pages = 0

    def add(self, adapter: AdapterVersion) -> None:
        self.adapters[adapter.version] = adapter
        self.pages += adapter.pages

    def discard(self, adapter: AdapterVersion) -> None:
        if self.adapters.pop(adapter.version, None) is not None:
            self.pages -= adapter.pages


class DeviceTier:
    """version → AdapterVersion, of those that have pages. `on_evict(version)` is told of every eviction."""

    def __init__(
        self,
        pool: PagePool,
        clock: GdsfClock,
        table: TableWriter,
        copier: Copier,
        *,
        policy: str = "lru",
        max_count: int | None = None,
        max_pages: int | None = None,
        on_evict: Callable[[int], None] = lambda _version: None,
        now: Callable[[], float] = monotonic,
    ):
        self.pool = pool
        self.max_count = max_count
        self.max_pages = max_pages
        self.pages = 0  # of all residents, those being copied included
        self._clock = clock
        self._table = table
        self._copier = copier
        self._forecast = CopyForecast(now)
        self._key = EVICTION_POLICIES[policy]
        self._on_evict = on_evict
        self._residents: dict[int, AdapterVersion] = {}  # those being copied included
        self._in_flight: dict[int, CopyInFlight] = {}  # in the order of their starts
        self._idle = _Idle()  # no waiting request will ask for them soon
        self._demanded = _Idle()  # idle as well, but some will
        self._free_slots: list[int] = []
        self._tick = 0
        self._shrinking = False  # a limit was lowered; what is in use still exceeds it

    # ------------------------------------------------------------------ bringing in

    def has_room_for(self, num_pages: int, available: int, count: int = 1, *, urgent: bool = False) -> bool:
        """Whether `count` adapters of `num_pages` together could be brought in now. `available`: pages that are free
        or could be reclaimed, idle adapters' included. urgent: those that waiting requests will ask for may go."""
        idle_count = len(self._idle.adapters) + urgent * len(self._demanded.adapters)
        idle_pages = self._idle.pages + urgent * self._demanded.pages
        return (
            (self.max_count is None or len(self) - idle_count + count <= self.max_count)
            and (self.max_pages is None or self.pages - idle_pages + num_pages <= self.max_pages)
            and num_pages <= available - (0 if urgent else self._demanded.pages)
        )

    def make_room(self, num_pages: int, fence: int) -> None:
        """Evict idle adapters until one of `num_pages` is within this tier's own limits."""
        while self._over(1, num_pages):
            self.evict(fence)

    def set_limits(self, max_count: int | None, max_pages: int | None, fence: int) -> None:
        self.max_count, self.max_pages = max_count, max_pages
        self.shrink(fence)

    def shrink(self, fence: int) -> None:
        """Where a lowered limit is not kept yet: evict what is idle by now."""
        while self._over(0, 0) and self._victim() is not None:
            self.evict(fence)
        self._shrinking = self._over(0, 0)

    def start_copy(self, adapter: AdapterVersion) -> None:
        """ON_HOST → LOADING. The caller has made room and seen `pool.ready >= adapter.pages`."""
        assert adapter.host is not None
        pages = self.pool.alloc_adapter(adapter.pages)
        slot = self._free_slots.pop() if self._free_slots else len(self)
        buffer = adapter.host.buffer  # read once: another thread may put the entry elsewhere at any moment
        copy = self._copier.start_copy(buffer, pages, adapter.host.table)
        self._in_flight[adapter.version] = CopyInFlight(copy, buffer, self._forecast.now())
        tick = self._next_tick()
        adapter.device = DeviceEntry(slot, pages, tick, tick, self._clock.now)
        self._residents[adapter.version] = adapter
        self.pages += len(pages)
        adapter.loads += 1
        adapter.move(State.LOADING)

    def poll_copies(self) -> list[AdapterVersion]:
        """Those whose copy has just finished: RESIDENT, if they have not been unloaded meanwhile."""
        done = [version for version, copy in self._in_flight.items() if copy.copy.done()]
        self._forecast.observe([self._in_flight.pop(version) for version in done])
        finished = [self._residents[version] for version in done]
        for adapter in finished:
            if adapter.state is State.LOADING:
                assert adapter.device is not None and adapter.layout is not None
                self._table.install(adapter.device.slot, adapter.layout, adapter.device.pages)
                adapter.move(State.RESIDENT)
                self.refile(adapter)
        return finished

    @property
    def copying(self) -> list[AdapterVersion]:
        """In the order of their copies."""
        return [self._residents[version] for version in self._in_flight]

    def seconds_left(self, version: int) -> float | None:
        """Seconds until its copy is done. None: it is not being copied, or nothing is known yet."""
        if version not in self._in_flight:
            return None
        before = list(self._in_flight).index(version)
        return self._forecast.seconds_left(list(self._in_flight.values())[: before + 1])

    def close(self) -> None:
        self._copier.close()

    # ------------------------------------------------------------------ use

    def acquire_slot(self, adapter: AdapterVersion) -> int:
        """A request runs on it, which is resident, until `release_slot`. Returns its slot in the LoRA table."""
        assert adapter.device is not None and adapter.state is State.RESIDENT
        adapter.refs += 1
        adapter.device.uses += 1
        self._touch(adapter, adapter.device)
        return adapter.device.slot

    def release_slot(self, adapter: AdapterVersion) -> None:
        assert adapter.device is not None and adapter.refs > 0
        adapter.refs -= 1
        self._touch(adapter, adapter.device)

    def nearest_to_idle(self, count: int, besides: Collection[int]) -> set[int]:
        """The `count` adapters in use that the fewest running requests use, `besides` and pinned ones left out."""
        used = [
            (adapter.refs, version)
            for version, adapter in self._residents.items()
            if adapter.refs and not adapter.pinned and version not in besides
        ]
        return {version for _, version in sorted(used)[:count]}

    def count_demand(self, adapter: AdapterVersion, change: int) -> None:
        """`change` more waiting requests than before will ask for it soon: others are evicted before it."""
        adapter.queued_demand += change
        self.refile(adapter)

    def refile(self, adapter: AdapterVersion) -> None:
        """Count it anew, after its state, references, claim or demand have changed."""
        self._idle.discard(adapter)
        self._demanded.discard(adapter)
        if adapter.device_evictable:
            (self._demanded if adapter.queued_demand else self._idle).add(adapter)

    def _touch(self, adapter: AdapterVersion, entry: DeviceEntry) -> None:
        entry.last_used = self._next_tick()
        entry.score = self._clock.score(entry.uses, ADAPTER_PAGE_COST)
        adapter.changed()
        self.refile(adapter)

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick

    # ------------------------------------------------------------------ leaving

    def remove(self, adapter: AdapterVersion, fence: int) -> None:
        """Free its pages and its slot, pinned or not. Nobody uses it; the caller moves it to another state."""
        entry = adapter.device
        assert entry is not None and adapter.version not in self._in_flight and adapter.refs == 0
        if adapter.state is State.RESIDENT:  # else it was unloaded before it got there
            self._table.remove(entry.slot)
        del self._residents[adapter.version]
        self._idle.discard(adapter)
        self._demanded.discard(adapter)
        self._free_slots.append(entry.slot)
        self.pages -= len(entry.pages)
        self.pool.free_pages(entry.pages, fence)
        adapter.device = None

    def idle_pages(self) -> int:
        return self._idle.pages + self._demanded.pages

    def peek_victim(self) -> float | None:
        victim = self._victim()
        if victim is None or victim.device is None:
            return None
        return victim.device.score + (DEMANDED_SCORE if victim.queued_demand else 0.0)

    def evict(self, fence: int) -> int:
        """Back to where its bytes are. Returns its number of pages."""
        victim = self._victim()
        assert victim is not None
        self._evict(victim, fence)
        return victim.pages

    def evict_all(self, fence: int) -> list[AdapterVersion]:
        """Every resident, pinned ones too. Nothing runs on any of them, and none is being copied."""
        evicted = list(self._residents.values())
        for adapter in evicted:
            self._evict(adapter, fence)
        return evicted

    def _evict(self, adapter: AdapterVersion, fence: int) -> None:
        self.remove(adapter, fence)
        adapter.evictions += 1
        adapter.move(State.ON_HOST if adapter.host is not None else State.REGISTERED)
        self._on_evict(adapter.version)

    def _over(self, count: int, num_pages: int) -> bool:
        """Would `count` more adapters of `num_pages` in all be over a limit of this tier?"""
        return (self.max_count is not None and len(self) + count > self.max_count) or (
            self.max_pages is not None and self.pages + num_pages > self.max_pages
        )

    def _victim(self) -> AdapterVersion | None:
        """The policy's choice among those that no waiting request will ask for; else among all that are idle."""

        def key(adapter: AdapterVersion) -> tuple[float, int]:
            assert adapter.device is not None
            return self._key(adapter.device), adapter.device.loaded_at

        return min((self._idle.adapters or self._demanded.adapters).values(), key=key, default=None)

    # ------------------------------------------------------------------ books

    def __len__(self) -> int:
        """Adapters that have pages, those being copied included."""
        return len(self._residents)

    def check(self) -> None:
        """Raise AssertionError if the books do not balance."""
        entries = {a.version: a.device for a in self._residents.values() if a.device is not None}
        assert entries.keys() == self._residents.keys(), "a resident without an entry"
        slots = [entry.slot for entry in entries.values()] + self._free_slots
        assert sorted(slots) == list(range(len(slots))), f"slots lost or doubled: {slots}"
        pages = [page for entry in entries.values() for page in entry.pages]
        assert len(pages) == len(set(pages)) == self.pages
        assert not self._over(0, 0) or self._shrinking, "over a limit"
        arrived = {a.version for a in self._residents.values() if a.state is State.RESIDENT}
        assert self._in_flight.keys() == entries.keys() - arrived
        idle = {a.version for a in self._residents.values() if a.device_evictable}
        demanded = {version for version in idle if self._residents[version].queued_demand}
        for found, expected in ((self._idle, idle - demanded), (self._demanded, demanded)):
            assert found.adapters.keys() == expected, "idle adapters are miscounted"
            assert found.pages == sum(a.pages for a in found.adapters.values())
