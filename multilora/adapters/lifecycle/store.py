"""Every adapter version that the engine knows, and its way through the tiers (`version.py` draws it).

The engine calls `load`, `unload` and `poll_loads`; the scheduler asks through `components.py`. Fetching happens in
the loader, never here. Knows versions, not names. An adapter that does not change costs a step nothing: the sums that
a step asks for are counted as they change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from time import monotonic

import torch

from multilora.adapters.host.mapping import HostEntry
from multilora.adapters.lifecycle.device_tier import DeviceTier
from multilora.adapters.lifecycle.fetch_queue import FetchQueue, LoadTraces
from multilora.adapters.lifecycle.host_tier import HostTier
from multilora.adapters.lifecycle.limits import TierLimits
from multilora.adapters.lifecycle.version import AdapterVersion, State
from multilora.adapters.loading.loader import Fetched, Loader
from multilora.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterNotLoaded,
    AdapterStarvation,
    AdapterUnavailable,
    MultiloraError,
    from_wire,
)
from multilora.lora.panels import AdapterShape, PanelLayout
from multilora.memory.reclaim import Reclaimer


class LoadStatus(Enum):
    """What `request_load` found."""

    READY = "ready"  # resident: acquire its slot now
    COMING = "coming"  # on its way
    BLOCKED = "blocked"  # everything that could be evicted for it is in use


@dataclass(frozen=True)
class Loaded:
    """A `load` has ended: well, or with an error and nothing changed."""

    version: int
    error: MultiloraError | None = None


@dataclass(frozen=True)
class Lost:
    """A version that had been evicted could not be brought back; requests that wait for it get this error."""

    version: int
    error: MultiloraError


class AdapterStore:
    """version → AdapterVersion, over a host tier, a device tier and a loader.

    total_pages: of the arena; context_pages: what one full-context request takes (for the starvation rule). ranks: so
    many share the model; the host holds an adapter's pages of each of them. settle: is told of every adapter that has
    come to the host tier, and may change where in host memory it lies.
    """

    def __init__(
        self,
        loader: Loader,
        host: HostTier,
        device: DeviceTier,
        reclaimer: Reclaimer,
        *,
        layout_of: Callable[[AdapterShape], PanelLayout],
        leaves_kv: Callable[[AdapterShape], bool] = lambda _shape: False,
        settle: Callable[[HostEntry], None] = lambda _entry: None,
        page_bytes: int,
        ranks: int = 1,
        total_pages: int,
        context_pages: int,
    ):
        self.host = host
        self.device = device
        self.reclaimer = reclaimer
        self._page_bytes = page_bytes
        self.pinned_count = 0  # of loaded versions, wherever they are, as the pages
        self.pinned_pages = 0
        self._loader = loader
        self._layout_of = layout_of
        self._leaves_kv = leaves_kv
        self._settle = settle
        self.host_page_bytes = ranks * page_bytes
        self._limits = TierLimits(
            host,
            device,
            page_bytes=page_bytes,
            host_page_bytes=self.host_page_bytes,
            total_pages=total_pages,
            context_pages=context_pages,
        )
        self._adapters: dict[int, AdapterVersion] = {}
        self._fetches = FetchQueue(loader, host, self.host_page_bytes)
        self._claims: dict[int, AdapterVersion] = {}  # claimed in this plan
        self._pins_coming: dict[int, AdapterVersion] = {}  # pinned, and not on the device yet
        self._suspended = False  # nothing is copied to the device
        self._loaded_count = self._loaded_pages = 0
        self._changes: dict[int, AdapterVersion] = {}  # since `take_changes`
        self._gone: list[int] = []  # reported versions that were unloaded since

    @property
    def traces(self) -> LoadTraces | None:
        """Whose spans fetches belong below."""
        return self._fetches.traces

    @traces.setter
    def traces(self, traces: LoadTraces | None) -> None:
        self._fetches.traces = traces

    # ------------------------------------------------------------------ the engine's calls

    def load(self, version: int, path: str, pinned: bool) -> None:
        """Start to bring in a new version. How it ended comes from `poll_loads`."""
        assert version not in self._adapters, "versions are never reused"
        self._adapters[version] = AdapterVersion(version, path, pinned, self._changes)
        self._enqueue_fetch(self._adapters[version])

    def unload(self, version: int, fence: int) -> None:
        """Forget a version and free its memory. No request is on it. Raises AdapterNotLoaded, also while it loads."""
        if not self.known(version):
            raise AdapterNotLoaded(f"adapter version {version} does not exist")
        adapter = self._adapters[version]
        assert adapter.refs == adapter.waiting == 0, "a request needs it"
        self._loaded_count -= 1
        self._loaded_pages -= adapter.pages
        if adapter.pinned:
            self.pinned_count -= 1
            self.pinned_pages -= adapter.pages
            self._pins_coming.pop(version, None)
        if adapter.reported:
            self._gone.append(version)
        self.unclaim([version])
        self.host.remove(adapter)
        if adapter.state in (State.FETCHING, State.LOADING):
            adapter.move(State.DRAINING)
            return
        if adapter.state is State.QUEUED:
            self._fetches.remove(adapter)
        if adapter.state is State.RESIDENT:
            self.device.remove(adapter, fence)
        self._forget(adapter)

    def poll_loads(self, fence: int) -> list[Loaded | Lost]:
        """Take in what the loader and the copies have finished; start what can start."""
        self._poll_copies(fence)
        self.device.shrink(fence)
        events = [event for done in self._fetches.poll_fetches() if (event := self._take_fetched(*done))]
        for version in [] if self._suspended else list(self._pins_coming):
            self.request_load(version, fence, urgent=True)
        return events + self._start_fetches()

    def set_limits(self, *, device_bytes: int | None, max_count: int | None, fence: int) -> None:
        """Other limits of the device tier from now on, None: none. Where less fits than is resident, idle adapters
        are evicted at once, others as soon as no request runs on them. Raises ConfigError, with nothing changed."""
        self._limits.check_device(device_bytes, max_count, self.loaded())
        max_pages = None if device_bytes is None else device_bytes // self._page_bytes
        self.device.set_limits(max_count, max_pages, fence)

    def suspend_copies(self, fence: int) -> None:
        """Evict every adapter from the device, and bring none there until `resume_copies`. No request runs on one,
        none is being copied. Loads and unloads go on, in host memory."""
        self._suspended = True
        evicted = self.device.evict_all(fence)
        self._pins_coming |= {adapter.version: adapter for adapter in evicted if adapter.pinned}

    def resume_copies(self) -> None:
        """Pinned adapters come back by themselves, others when a request asks for them."""
        self._suspended = False

    @property
    def busy(self) -> bool:
        """Something is on its way that `poll_loads` will report."""
        return bool(self._fetches)

    @property
    def working(self) -> bool:
        """`poll_loads` has work to do: call it again without waiting for the loader."""
        return self._loader.working

    @property
    def copying(self) -> bool:
        """Adapters are being copied to the device, which only the next `poll_loads` notices."""
        return bool(self.device.copying)

    def fileno(self) -> int | None:
        """Readable when the loader has something to say; None: it has no such descriptor."""
        return self._loader.fileno()

    def close(self) -> None:
        self._loader.close()
        self.device.close()

    # ------------------------------------------------------------------ the scheduler's calls

    def begin_plan(self) -> None:
        """A new plan: adapters that no request asks for in it may be evicted."""
        self.unclaim(list(self._claims))

    def request_load(self, version: int, fence: int, *, urgent: bool = False, spare: int = 0) -> LoadStatus:
        """Is the version resident? If not, do the next thing that brings it nearer.

        urgent: adapters that other waiting requests will ask for may be evicted. spare: pages to leave for others.
        """
        adapter = self._adapters[version]
        match adapter.state:
            case State.RESIDENT:
                return LoadStatus.READY
            case State.REGISTERED | State.FAILED:
                self._enqueue_fetch(adapter)
            case State.ON_HOST:
                return self._request_copy(adapter, fence, urgent, spare)
        return LoadStatus.COMING

    def _request_copy(self, adapter: AdapterVersion, fence: int, urgent: bool, spare: int) -> LoadStatus:
        self.host.touch(adapter)
        if adapter.asked_at is None:
            adapter.asked_at = monotonic()
        if not self.device.has_room_for(adapter.pages, self.reclaimer.available() - spare, urgent=urgent):
            return LoadStatus.BLOCKED  # not claimed: that could keep others out of host memory for long
        self._claim(adapter)
        self.device.make_room(adapter.pages, fence)
        self.reclaimer.ensure(adapter.pages, fence)
        if self.device.pool.ready < adapter.pages:
            return LoadStatus.COMING  # the rest is free once the running step has finished
        self.unclaim([adapter.version])  # its state keeps it from now on
        self.device.start_copy(adapter)
        self._poll_copies(fence)
        return LoadStatus.READY if adapter.state is State.RESIDENT else LoadStatus.COMING

    def claim_on_device(self, version: int) -> bool:
        """Keep it on the device until the next plan, though no request runs on it yet. False: it is not there, or
        claimed already."""
        adapter = self._adapters[version]
        if adapter.device is None or adapter.claimed:
            return False
        self._claim(adapter)
        return True

    def unclaim(self, versions: list[int]) -> None:
        """End the claims of this plan on those of them that have one."""
        for version in versions:
            if adapter := self._claims.pop(version, None):
                adapter.claimed = False
                self.device.refile(adapter)

    def _claim(self, adapter: AdapterVersion) -> None:
        adapter.claimed = True
        self._claims[adapter.version] = adapter
        self.device.refile(adapter)

    # ------------------------------------------------------------------ what is known

    def known(self, version: int) -> bool:
        """Its first load has ended well, and it has not been unloaded."""
        adapter = self._adapters.get(version)
        return adapter is not None and adapter.known

    def get(self, version: int) -> AdapterVersion:
        return self._adapters[version]

    def loaded(self) -> list[AdapterVersion]:
        """Every known version. O(adapters)."""
        return [adapter for adapter in self._adapters.values() if adapter.known]

    def take_changes(self) -> tuple[list[AdapterVersion], list[int]]:
        """What differs since the last call: known versions whose statistics have changed, and versions that were
        reported once and have been unloaded. O(changes)."""
        changed, gone = [adapter for adapter in self._changes.values() if adapter.known], self._gone
        self._gone = []
        self._changes.clear()
        for adapter in changed:
            adapter.reported = True
        return changed, gone

    def slots(self) -> tuple[int, int]:
        """(resident now, how many could be: the limit, or what memory holds at the loaded adapters' mean size)."""
        if self.device.max_count is not None:
            return len(self.device), self.device.max_count
        room = self._limits.device_pages
        return len(self.device), room * self._loaded_count // self._loaded_pages if self._loaded_pages else 0

    def check(self) -> None:
        """Raise AssertionError if the books do not balance. O(adapters)."""
        adapters, loaded = self._adapters.values(), self.loaded()
        self.host.check()
        self.device.check()
        self._fetches.check(adapters)
        for adapter in adapters:
            adapter.check()
        assert self._claims.keys() == {a.version for a in adapters if a.claimed}
        assert (self._loaded_count, self._loaded_pages) == (len(loaded), sum(a.pages for a in loaded))
        pinned = [a for a in loaded if a.pinned]
        assert (self.pinned_count, self.pinned_pages) == (len(pinned), sum(a.pages for a in pinned))
        assert self._pins_coming.keys() == {a.version for a in pinned if a.state is not State.RESIDENT}

    # ------------------------------------------------------------------ inside

    def _enqueue_fetch(self, adapter: AdapterVersion) -> None:
        if adapter.known:
            adapter.asked_at = monotonic()
        self._fetches.add(adapter)

    def _start_fetches(self) -> list[Loaded | Lost]:
        """Returns what becomes of those that the host tier could never hold."""
        limits = [b for b in (self.host.max_bytes, self._limits.largest_bytes()) if b is not None]
        hopeless = self._fetches.start_fetches(min(limits), self._kept_on_host())
        message = "starvation: {}: pinned adapters fill --max-loaded-loras or --lora-host-bytes"
        return [self._fail(adapter, AdapterStarvation(message.format(adapter.path))) for adapter in hopeless]

    def _kept_on_host(self) -> list[AdapterVersion]:
        """Those that are not pinned and whose bytes must stay on the host all the same."""
        candidates = {a.version: a for a in (*self._claims.values(), *self.device.copying)}
        return [a for a in candidates.values() if a.host is not None and not a.pinned and not a.host_evictable]

    def _take_fetched(
        self, adapter: AdapterVersion, result: Fetched, buffer: torch.Tensor | None
    ) -> Loaded | Lost | None:
        if adapter.state is State.DRAINING:
            self._forget(adapter)
            return None
        first = adapter.layout is None
        try:
            if result.kind:
                raise from_wire(result.kind, result.message)
            assert buffer is not None and result.shape is not None
            layout = self._layout_of(result.shape)
            self._check_fetched(adapter, result, layout, buffer.numel())
        except MultiloraError as error:
            return self._fail(adapter, error)
        if first:
            self._take_facts(adapter, result, layout)
        entry = HostEntry(layout, buffer, result.table)
        self.host.add(adapter, entry)
        adapter.move(State.ON_HOST)
        self._settle(entry)
        return Loaded(adapter.version) if first else None

    def _check_fetched(self, adapter: AdapterVersion, result: Fetched, layout: PanelLayout, nbytes: int) -> None:
        """Raise AdapterError for one that cannot be taken in."""
        if adapter.layout is None:
            self._limits.check_room(adapter.path, layout.num_pages, self.pinned_pages)
            if adapter.pinned:
                self._limits.check_pin(adapter.path, layout.num_pages, self.loaded())
        elif result.fingerprint != adapter.fingerprint:
            raise AdapterError(f"{adapter.path} has changed since it was loaded: unload it and load it again")
        if not self.host.has_room_for(1, nbytes):
            raise AdapterIncompatible(f"{adapter.path}: pinned adapters leave it no room in --lora-host-bytes")

    def _take_facts(self, adapter: AdapterVersion, result: Fetched, layout: PanelLayout) -> None:
        """Its first fetch went well: it is known from now on."""
        adapter.layout, adapter.rank, adapter.target_modules = layout, result.rank, result.target_modules
        adapter.fingerprint, adapter.invocation_tokens = result.fingerprint, result.invocation_tokens
        adapter.leaves_kv = self._leaves_kv(layout.shape)
        self._loaded_count += 1
        self._loaded_pages += adapter.pages
        if adapter.pinned:
            self.pinned_count += 1
            self.pinned_pages += adapter.pages
            self._pins_coming[adapter.version] = adapter

    def _fail(self, adapter: AdapterVersion, error: MultiloraError) -> Loaded | Lost:
        """A fetch ended badly: a new version is forgotten, an old one may be asked for again."""
        adapter.asked_at = None
        if adapter.known:
            adapter.move(State.FAILED)
            return Lost(adapter.version, AdapterUnavailable(f"the adapter cannot be brought back: {error.message}"))
        self._forget(adapter)
        return Loaded(adapter.version, error)

    def _poll_copies(self, fence: int) -> None:
        for adapter in self.device.poll_copies():
            if adapter.state is State.DRAINING:
                self.device.remove(adapter, fence)
                self._forget(adapter)
                continue
            if adapter.asked_at is not None:
                adapter.load_seconds += monotonic() - adapter.asked_at
                adapter.asked_at = None
            self._pins_coming.pop(adapter.version, None)

    def _forget(self, adapter: AdapterVersion) -> None:
        adapter.move(State.GONE)
        del self._adapters[adapter.version]
        del self._changes[adapter.version]
