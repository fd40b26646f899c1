"""The device tier: which adapter versions lie in the arena, who uses them, who may leave.

An adapter takes whole pages of the one arena at its true rank. `max_count` and `max_pages` are limits, nothing is
reserved. Idle, unpinned adapters compete with idle prefix pages for the pool (`memory/reclaim.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from time import monotonic

import torch

from multilora.adapters.device.copier import Copier, Copy
from multilora.adapters.device.eviction import EVICTION_POLICIES
from multilora.adapters.device.forecast import CopyForecast
from multilora.adapters.host.cache import HostEntry
from multilora.lora.panels import PanelLayout
from multilora.lora.table import TableWriter
from multilora.memory.page_pool import PagePool
from multilora.memory.reclaim import ADAPTER_PAGE_COST, GdsfClock

AWAITED_SCORE = 64 * ADAPTER_PAGE_COST
"""On top, for an adapter that a waiting request will ask for: as if it had been used as often as counts at all."""


class Fit(Enum):
    """Can an adapter be brought in now?"""

    YES = "yes"
    SOON = "soon"  # pages are free but still fenced: ask again when the running step has finished
    NO = "no"  # everything that could leave is in use or pinned


@dataclass(eq=False)
class Resident:
    """One adapter version on the device (or being copied there)."""

    version: int
    slot: int
    pages: list[int]
    layout: PanelLayout
    pinned: bool
    copy: Copy | None  # until it is done
    buffer: torch.Tensor | None  # what the copy reads, likewise: the host tier may have let go of it
    loaded_at: int
    last_used: int
    score: float
    uses: int = 0
    refs: int = 0
    ready: bool = False
    held: bool = False  # it waits for other components of a composition

    @property
    def idle(self) -> bool:
        return self.ready and self.refs == 0 and not self.pinned and not self.held


class Residency:
    """version → Resident. `on_evict(version)` is told of every adapter that gives way."""

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
        on_evict: Callable[[int], None] = lambda version: None,
        now: Callable[[], float] = monotonic,
    ):
        self.pool = pool
        self.clock = clock
        self.max_count = max_count
        self.max_pages = max_pages
        self.awaited: Counter[int] = Counter()  # version → waiting requests that will ask for it
        self.forecast = CopyForecast(now)
        self._table = table
        self._copier = copier
        self._key = EVICTION_POLICIES[policy]
        self._on_evict = on_evict
        self._residents: dict[int, Resident] = {}
        self._copying: list[Resident] = []
        self._held: list[Resident] = []
        self._pages = 0
        self._free_slots: list[int] = []
        self._tick = 0
        self._shrinking = False  # a limit was lowered; what is in use still exceeds it

    # ------------------------------------------------------------------ bringing in

    def room_for(self, num_pages: int, available: int, count: int = 1, *, urgent: bool = False) -> Fit:
        """For `count` adapters of `num_pages` together. `available`: pages that are free or could be reclaimed,
        adapters' idle ones included. Those that waiting requests will ask for stay, unless it is urgent."""
        idle = [r for r in self._residents.values() if r.idle]
        if not urgent:
            available -= sum(len(r.pages) for r in idle if self.awaited[r.version])
            idle = [r for r in idle if not self.awaited[r.version]]
        if self.max_count is not None and len(self._residents) - len(idle) + count > self.max_count:
            return Fit.NO
        if self.max_pages is not None:
            held = self._pages - sum(len(r.pages) for r in idle)
            if held + num_pages > self.max_pages:
                return Fit.NO
        if available < num_pages:
            return Fit.NO
        return Fit.YES

    def make_room(self, num_pages: int, fence: int) -> None:
        """Evict idle adapters until one of `num_pages` is within this tier's own limits."""
        while self._over(1, num_pages):
            self.evict(fence)

    def set_limits(self, max_count: int | None, max_pages: int | None, fence: int) -> None:
        self.max_count, self.max_pages = max_count, max_pages
        self.shrink(fence)

    def shrink(self, fence: int) -> None:
        """Where a lowered limit is not kept yet: evict who is idle by now."""
        while self._over(0, 0) and self._victim() is not None:
            self.evict(fence)
        self._shrinking = self._over(0, 0)

    def start(self, version: int, entry: HostEntry, pinned: bool) -> Resident:
        """Begin the copy. The caller has made room and seen `pool.ready >= entry.layout.num_pages`."""
        assert version not in self._residents
        pages = self.pool.alloc_adapter(entry.layout.num_pages)
        slot = self._free_slots.pop() if self._free_slots else len(self._residents)
        buffer = entry.buffer  # another thread may put the entry elsewhere at any moment
        copy = self._copier.start(buffer, pages)
        tick = self._next_tick()
        score = self.clock.now
        resident = Resident(version, slot, pages, entry.layout, pinned, copy, buffer, tick, tick, score)
        self._residents[version] = resident
        self._copying.append(resident)
        self.forecast.started(version, entry.nbytes)
        self._pages += len(pages)
        return resident

    def poll(self) -> list[int]:
        """Versions whose copy has just finished; they can be used from the next plan on."""
        finished = [r for r in self._copying if r.copy is not None and r.copy.done()]
        for resident in finished:
            self._copying.remove(resident)
            self._table.install(resident.slot, resident.layout, resident.pages)
            resident.copy = resident.buffer = None
            resident.ready = True
        versions = [r.version for r in finished]
        self.forecast.finished(versions)
        return versions

    def close(self) -> None:
        self._copier.close()

    # ------------------------------------------------------------------ use

    def get(self, version: int) -> Resident | None:
        return self._residents.get(version)

    def acquire(self, version: int) -> int:
        """A request runs on it: it stays until released. Returns its slot."""
        resident = self._residents[version]
        assert resident.ready
        resident.refs += 1
        resident.uses += 1
        self._touch(resident)
        return resident.slot

    def release(self, version: int) -> None:
        resident = self._residents[version]
        assert resident.refs > 0
        resident.refs -= 1
        self._touch(resident)

    def hold(self, version: int) -> bool:
        """Let it not give way until `end_holds`, though nobody runs on it. False: it is not resident, or held
        already."""
        resident = self._residents.get(version)
        if resident is None or resident.held:
            return False
        resident.held = True
        self._held.append(resident)
        return True

    def end_holds(self, versions: Iterable[int] | None = None) -> None:
        """Of these versions; None: of all."""
        ended = self._held if versions is None else [r for r in self._held if r.version in versions]
        for resident in ended:
            resident.held = False
        self._held = [r for r in self._held if r.held]

    def _touch(self, resident: Resident) -> None:
        resident.last_used = self._next_tick()
        resident.score = self.clock.score(resident.uses, ADAPTER_PAGE_COST)

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick

    # ------------------------------------------------------------------ leaving

    def remove(self, version: int, fence: int) -> None:
        """Free the adapter's pages, pinned or not. Nobody uses it."""
        resident = self._residents.pop(version)
        assert resident.refs == 0 and resident.ready
        self._table.remove(resident.slot)
        self._free_slots.append(resident.slot)
        self._pages -= len(resident.pages)
        self.pool.free_pages(resident.pages, fence)

    def idle_pages(self) -> int:
        return sum(len(r.pages) for r in self._residents.values() if r.idle)

    def peek_victim(self) -> float | None:
        victim = self._victim()
        if victim is None:
            return None
        return victim.score + (AWAITED_SCORE if self.awaited[victim.version] else 0.0)

    def evict(self, fence: int) -> int:
        victim = self._victim()
        assert victim is not None
        self.remove(victim.version, fence)
        self._on_evict(victim.version)
        return len(victim.pages)

    def _over(self, count: int, num_pages: int) -> bool:
        """Would `count` more adapters of `num_pages` in all be over a limit of this tier?"""
        return (self.max_count is not None and len(self._residents) + count > self.max_count) or (
            self.max_pages is not None and self._pages + num_pages > self.max_pages
        )

    def _victim(self) -> Resident | None:
        """Whom nobody waits for; else whom somebody does."""
        idle = (r for r in self._residents.values() if r.idle)
        return min(idle, key=lambda r: (self.awaited[r.version] > 0, self._key(r)), default=None)

    # ------------------------------------------------------------------ books

    @property
    def pages(self) -> int:
        return self._pages

    def pinned_pages(self) -> int:
        return sum(len(r.pages) for r in self._residents.values() if r.pinned)

    def in_use(self) -> list[int]:
        """Versions that some request runs on."""
        return [r.version for r in self._residents.values() if r.refs]

    def __len__(self) -> int:
        return len(self._residents)

    def check(self) -> None:
        """Raise AssertionError if the books do not balance."""
        slots = [r.slot for r in self._residents.values()] + self._free_slots
        assert sorted(slots) == list(range(len(slots))), f"slots lost or doubled: {slots}"
        pages = [p for r in self._residents.values() for p in r.pages]
        assert len(pages) == len(set(pages)) == self._pages
        assert not self._over(0, 0) or self._shrinking, "over a limit"
