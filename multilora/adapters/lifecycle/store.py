"""Every adapter version the engine knows, and its way: disk → host → device, and back when others need the room.

    REGISTERED ──fetch──► ON_HOST ──copy──► RESIDENT       evicted ones return by themselves when asked for
         ▲                   │  ▲               │
         └──── host evicts ──┘  └─ device evicts┘

The engine calls `load`, `unload` and `poll`; the scheduler calls `want`, `acquire` and `release`. Fetching happens in
the loader, never here. Knows versions, not names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from time import monotonic

import torch

from multilora.adapters.device.residency import Fit, Residency
from multilora.adapters.host.cache import HostCache, HostEntry
from multilora.adapters.loading.loader import Fetched, FetchJob, Loader
from multilora.adapters.versions.limits import Limits
from multilora.adapters.versions.record import Record
from multilora.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterNotLoaded,
    AdapterStarvation,
    MultiloraError,
    from_wire,
)
from multilora.lora.panels import AdapterShape, PanelLayout
from multilora.memory.reclaim import Reclaimer


class LoadStatus(Enum):
    """What `want` found."""

    READY = "ready"  # resident: acquire it now
    COMING = "coming"  # on its way
    BLOCKED = "blocked"  # everything that could make room is in use


@dataclass(frozen=True)
class Loaded:
    """A `load` has ended: well, or with an error and nothing changed."""

    version: int
    error: MultiloraError | None = None


@dataclass(frozen=True)
class Lost:
    """A version that had been evicted could not be brought back; who waits for it gets this error."""

    version: int
    error: MultiloraError


class AdapterStore:
    """versions → Record, over a host cache, a device tier and a loader.

    total_pages: of the arena; context_pages: what one full-context request takes (for the starvation rule). settle:
    is told of every adapter that has come to the host tier, and may change where in host memory it lies.
    """

    def __init__(
        self,
        loader: Loader,
        host: HostCache,
        residency: Residency,
        reclaimer: Reclaimer,
        *,
        layout_of: Callable[[AdapterShape], PanelLayout],
        leaves_kv: Callable[[AdapterShape], bool] = lambda shape: False,
        settle: Callable[[HostEntry], None] = lambda entry: None,
        page_bytes: int,
        total_pages: int,
        context_pages: int,
        on_evict: Callable[[int], None] = lambda version: None,
    ):
        self.loader = loader
        self.host = host
        self.residency = residency
        self._reclaimer = reclaimer
        self._layout_of = layout_of
        self._leaves_kv = leaves_kv
        self._settle = settle
        self._page_bytes = page_bytes
        self._limits = Limits(
            host, residency, page_bytes=page_bytes, total_pages=total_pages, context_pages=context_pages
        )
        self._on_evict = on_evict
        self._records: dict[int, Record] = {}
        self._loading: set[int] = set()  # versions whose first `load` has not ended
        self._pinned: set[int] = set()
        self._locked: set[int] = set()  # versions whose host entry is locked
        self._to_fetch: list[int] = []  # in order
        self._fetching: dict[int, int] = {}  # version → bytes expected, 0 if not known yet

    # ------------------------------------------------------------------ the engine's calls

    def load(self, version: int, path: str, pinned: bool) -> None:
        """Start to bring in a new version. How it ended comes from `poll`."""
        assert version not in self._records, "versions are never reused"
        self._records[version] = Record(version, path, pinned)
        self._loading.add(version)
        self._ask(self._records[version])

    def unload(self, version: int, fence: int) -> None:
        """Forget a version and free its memory. No request is on it. Raises AdapterNotLoaded, also while it loads."""
        if not self.known(version):
            raise AdapterNotLoaded(f"adapter version {version} does not exist")
        self._forget(version, fence)

    def poll(self, fence: int) -> list[Loaded | Lost]:
        """Take in what the loader and the copies have finished; start what can start."""
        for version in self.residency.poll():
            self._arrived_on_device(version, fence)
        self.residency.shrink(fence)
        events = [e for result, buffer in self.loader.poll() if (e := self._arrived(result, buffer, fence))]
        for version in list(self._pinned):
            if self.residency.get(version) is None:
                self.want(version, fence, urgent=True)
        return events + self._start_fetches(fence)

    def set_limits(self, *, device_bytes: int | None, max_count: int | None, fence: int) -> None:
        """Other limits of the device tier from now on, None: none. Where less fits than is resident, idle adapters
        leave at once and the others as soon as no request runs on them. Raises ConfigError, with nothing changed."""
        self._limits.check_device(device_bytes, max_count, self.records())
        max_pages = None if device_bytes is None else device_bytes // self._page_bytes
        self.residency.set_limits(max_count, max_pages, fence)

    @property
    def busy(self) -> bool:
        """Something is on its way that `poll` will report."""
        return bool(self._fetching or self._to_fetch)

    # ------------------------------------------------------------------ the scheduler's calls

    def begin_plan(self) -> None:
        """A new plan: what nobody asks for in it may leave host memory."""
        for version in list(self._locked):
            resident = self.residency.get(version)
            if resident is None or resident.ready:  # else a copy still reads it
                self._unlock(version)

    def want(self, version: int, fence: int, *, urgent: bool = False, spare: int = 0) -> LoadStatus:
        """Is the version resident? If not, do the next thing that brings it nearer.

        urgent: adapters that other waiting requests will ask for may give way. spare: pages to leave for others.
        """
        record = self._records[version]
        resident = self.residency.get(version)
        if resident is not None:
            return LoadStatus.READY if resident.ready else LoadStatus.COMING
        entry = self.host.get(version)
        if entry is None:
            self._ask(record)
            return LoadStatus.COMING
        if record.asked_at is None:
            record.asked_at = monotonic()
        pages = entry.layout.num_pages
        if self.residency.room_for(pages, self._reclaimer.available() - spare, urgent=urgent) is Fit.NO:
            return LoadStatus.BLOCKED  # not locked: who knows how long it would keep others out of host memory
        entry.locked = True
        self._locked.add(version)
        self.residency.make_room(pages, fence)
        self._reclaimer.ensure(pages, fence)
        if self.residency.pool.ready < pages:
            return LoadStatus.COMING  # the rest is free once the running step has finished
        resident = self.residency.start(version, entry, record.pinned)
        record.loads += 1
        for finished in self.residency.poll():
            self._arrived_on_device(finished, fence)
        return LoadStatus.READY if resident.ready else LoadStatus.COMING

    def acquire(self, version: int) -> int:
        return self.residency.acquire(version)

    def release(self, version: int) -> None:
        self.residency.release(version)

    def pinned_pages(self) -> int:
        """Of every pinned version, resident already or not."""
        return sum(self._records[v].pages for v in self._pinned)

    def host_bytes_of(self, version: int) -> int:
        entry = self.host.peek(version)
        return entry.nbytes if entry else 0

    def device_bytes_of(self, version: int) -> int:
        resident = self.residency.get(version)
        return len(resident.pages) * self._page_bytes if resident else 0

    def bytes_of(self, version: int) -> int:
        """Packed size."""
        return self._records[version].pages * self._page_bytes

    def slot_of(self, version: int) -> int:
        """In the LoRA table; the version is resident."""
        resident = self.residency.get(version)
        assert resident is not None and resident.ready
        return resident.slot

    def count_request(self, version: int) -> None:
        """A request asks for it for the first time: a hit if it is resident already."""
        record, resident = self._records[version], self.residency.get(version)
        hit = resident is not None and resident.ready
        record.hits += hit
        record.misses += not hit

    def known(self, version: int) -> bool:
        return version in self._records and version not in self._loading

    def pages_of(self, version: int) -> int:
        return self._records[version].pages

    def record(self, version: int) -> Record:
        return self._records[version]

    def records(self) -> list[Record]:
        """Of every version whose load has ended well."""
        return [r for v, r in self._records.items() if v not in self._loading]

    def evicted(self, version: int) -> None:
        """`Residency` tells that this version gave way."""
        self._records[version].evictions += 1
        self._on_evict(version)

    def slots(self) -> tuple[int, int]:
        """(resident now, how many could be: the limit, or what memory holds at the loaded adapters' mean size)."""
        if self.residency.max_count is not None:
            return len(self.residency), self.residency.max_count
        sizes = [r.pages for r in self.records()]
        room = self._limits.device_pages
        return len(self.residency), int(room / (sum(sizes) / len(sizes))) if sizes else 0

    def check(self) -> None:
        self.residency.check()
        assert set(self._fetching) | set(self._to_fetch) >= self._loading, "a load that nobody works on"

    def close(self) -> None:
        self.loader.close()
        self.residency.close()

    # ------------------------------------------------------------------ inside

    def _ask(self, record: Record) -> None:
        if not record.fetching:
            record.fetching = True
            if record.version not in self._loading:
                record.asked_at = monotonic()
            self._to_fetch.append(record.version)

    def _start_fetches(self, fence: int) -> list[Loaded | Lost]:
        """In order, as long as the host tier can hold what comes. Returns those that it never could."""
        limits = [b for b in (self.host.max_bytes, self._limits.largest_bytes()) if b is not None]
        failed = []
        while self._to_fetch:
            record = self._records[self._to_fetch[0]]
            expected = record.pages * self._page_bytes
            if not self.host.has_room_for(1, expected, ever=True):
                self._to_fetch.pop(0)
                message = f"{record.path}: pinned adapters fill --max-loaded-loras or --lora-host-bytes"
                failed.append(self._fail(record, AdapterStarvation(f"starvation: {message}"), fence))
                continue
            if not self.host.has_room_for(len(self._fetching) + 1, sum(self._fetching.values()) + expected):
                break
            self._to_fetch.pop(0)
            self._fetching[record.version] = expected
            record.fetches += 1
            self.loader.submit(FetchJob(record.version, record.path, min(limits)))
        return failed

    def _arrived(self, result: Fetched, buffer: torch.Tensor | None, fence: int) -> Loaded | Lost | None:
        self._fetching.pop(result.version, None)
        record = self._records.get(result.version)
        if record is None:
            return None  # unloaded while it was on its way
        record.fetching = False
        first = record.version in self._loading
        try:
            if result.kind:
                raise from_wire(result.kind, result.message)
            assert buffer is not None
            self._accept(record, result, buffer, first)
        except MultiloraError as error:
            return self._fail(record, error, fence)
        self._loading.discard(record.version)
        return Loaded(record.version) if first else None

    def _fail(self, record: Record, error: MultiloraError, fence: int) -> Loaded | Lost:
        """A fetch ended badly: a new version is forgotten, an old one may be asked for again."""
        record.fetching = False
        record.asked_at = None
        if record.version not in self._loading:
            return Lost(record.version, error)
        self._forget(record.version, fence)
        return Loaded(record.version, error)

    def _accept(self, record: Record, result: Fetched, buffer: torch.Tensor, first: bool) -> None:
        assert result.shape is not None
        layout = self._layout_of(result.shape)
        if not first and result.fingerprint != record.fingerprint:
            raise AdapterError(f"{record.path} has changed since it was loaded: unload it and load it again")
        if first:
            self._limits.check_room(record.path, layout.num_pages, self.pinned_pages())
            if record.pinned:
                self._limits.check_pin(record.path, layout.num_pages, self.records())
        if not self.host.has_room_for(1, buffer.numel(), ever=True):
            raise AdapterIncompatible(f"{record.path}: pinned adapters leave it no room in --lora-host-bytes")
        entry = HostEntry(layout, buffer, pinned=record.pinned)
        self.host.put(record.version, entry)
        self._settle(entry)
        record.layout, record.rank, record.target_modules = layout, result.rank, result.target_modules
        record.fingerprint, record.invocation_tokens = result.fingerprint, result.invocation_tokens
        record.leaves_kv = self._leaves_kv(result.shape)
        if record.pinned:
            self._pinned.add(record.version)

    def _arrived_on_device(self, version: int, fence: int) -> None:
        record = self._records.get(version)
        if record is None:  # unloaded while it was being copied
            self.residency.remove(version, fence)
            return
        if record.asked_at is not None:
            record.load_seconds += monotonic() - record.asked_at
            record.asked_at = None
        self._unlock(version)

    def _unlock(self, version: int) -> None:
        self._locked.discard(version)
        entry = self.host.peek(version)
        if entry is not None:
            entry.locked = False

    def _forget(self, version: int, fence: int) -> None:
        resident = self.residency.get(version)
        if resident is not None and resident.ready:
            self.residency.remove(version, fence)
        if version in self._to_fetch:
            self._to_fetch.remove(version)
        self._loading.discard(version)
        self._locked.discard(version)
        self._pinned.discard(version)
        self.host.remove(version)
        del self._records[version]
