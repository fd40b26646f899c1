"""What a request asks of the adapter store: all adapters of its composition at once, or none of them.

A composition waits until every component can be resident beside the others; until then it takes nobody's place. So
that two compositions can never wait for each other, components are kept for one only within one plan, oldest request
first. Called by `engine/scheduling/`, with versions in ascending order; none of them is the base model.
"""

from collections.abc import Sequence

from multilora.adapters.device.residency import Fit
from multilora.adapters.versions.store import AdapterStore, LoadStatus
from multilora.errors import CannotFit
from multilora.memory.page_table import KVPages

Versions = Sequence[int]


class Components:
    """store: None when LoRA is off; then there is only the base model."""

    def __init__(self, store: AdapterStore | None, kv: KVPages):
        self._optional_store = store
        self._kv = kv

    @property
    def _store(self) -> AdapterStore:
        assert self._optional_store is not None
        return self._optional_store

    def begin_plan(self) -> None:
        if self._optional_store is not None:
            self._store.residency.end_holds()
            self._store.begin_plan()

    def count_request(self, versions: Versions) -> None:
        """A request asks for them for the first time."""
        for version in versions:
            self._store.count_request(version)

    def enqueue(self, versions: Versions) -> None:
        """A request that waits, and may start soon, will ask for them."""
        for version in versions:
            self._store.residency.awaited[version] += 1

    def dequeue(self, versions: Versions) -> None:
        for version in versions:
            awaited = self._store.residency.awaited
            awaited[version] -= 1
            if not awaited[version]:
                del awaited[version]

    def ready(self, versions: Versions) -> bool:
        """Are all resident? Changes nothing."""
        residents = [self._store.residency.get(v) for v in versions]
        return all(r is not None and r.ready for r in residents)

    def seconds_left(self, versions: Versions) -> float | None:
        """Until all are there, if what is missing is on its way to the device and that can be judged."""
        missing = [v for v in versions if not self.ready((v,))]
        left = [self._store.residency.forecast.seconds_left(v) for v in missing]
        known = [seconds for seconds in left if seconds is not None]
        return max(known, default=0.0) if len(known) == len(missing) else None

    def want(self, versions: Versions, fence: int, *, urgent: bool = False, spare: int = 0) -> LoadStatus:
        """Are all resident? If not, do the next thing that brings them nearer. urgent, spare: see the store."""
        if not versions:
            return LoadStatus.READY
        if len(versions) == 1:
            return self._store.want(versions[0], fence, urgent=urgent, spare=spare)
        residency = self._store.residency
        held = [v for v in versions if residency.hold(v)]
        missing = [v for v in versions if residency.get(v) is None]
        if missing and not self._room_for(missing, urgent, spare):
            residency.end_holds(held)
            for version in missing:
                if not self._store.host_bytes_of(version):
                    self._store.want(version, fence)  # as far as host memory
            return LoadStatus.BLOCKED
        found = set()
        for version in versions:
            found.add(self._store.want(version, fence, urgent=urgent, spare=spare))
            residency.hold(version)
        return next(w for w in (LoadStatus.BLOCKED, LoadStatus.COMING, LoadStatus.READY) if w in found)

    def _room_for(self, versions: Versions, urgent: bool, spare: int) -> bool:
        pages = sum(self._store.pages_of(v) for v in versions)
        available = self._kv.reclaimer.available() - spare
        return self._store.residency.room_for(pages, available, len(versions), urgent=urgent) is not Fit.NO

    def acquire(self, versions: Versions) -> None:
        """A request runs on them. All are ready."""
        for version in versions:
            self._store.acquire(version)

    def release(self, versions: Versions) -> None:
        for version in versions:
            self._store.release(version)

    def slots(self, versions: Versions) -> tuple[int, ...]:
        """In the LoRA table; all are resident."""
        return tuple([self._store.slot_of(v) for v in versions])

    def check_fit(self, versions: Versions, tokens: int) -> None:
        """Raise CannotFit for what could never run, even alone, beside the adapters that are pinned (DESIGN §3)."""
        kv, room = self._kv, self._kv.pool.total
        need = kv.pages_for(tokens)
        if self._optional_store is not None:
            room -= self._store.pinned_pages()
            adapters = sum(self._store.pages_of(v) for v in self._unpinned(versions))
            need += adapters
            if len(versions) > 1:
                self._check_limits(versions, adapters)
        if need > room:
            raise CannotFit(
                f"prompt, max_new_tokens and adapters need {need} pages of {kv.page_size} tokens; {room} of "
                f"{kv.pool.total} are not pinned: lower max_new_tokens, or start with a larger --arena-bytes"
            )

    def _check_limits(self, versions: Versions, pages: int) -> None:
        """A single adapter within the limits was all that loading and pinning made sure of."""
        residency, pinned = self._store.residency, self._store.pinned_pages()
        unpinned, slots = len(self._unpinned(versions)), self._free_slots()
        if slots is not None and unpinned > slots:
            raise CannotFit(
                f"a composition of {len(versions)} adapters: --max-loras-per-batch {residency.max_count} and the "
                f"pinned adapters leave room for {slots} that are not pinned",
                param="lora_path",
            )
        if residency.max_pages is not None and pages > residency.max_pages - pinned:
            raise CannotFit(
                f"a composition of {pages} pages of adapters; --lora-device-bytes and the pinned adapters leave "
                f"{residency.max_pages - pinned}",
                param="lora_path",
            )

    def _free_slots(self) -> int | None:
        """What the pinned adapters leave of --max-loras-per-batch."""
        limit = self._store.residency.max_count
        return None if limit is None else limit - sum(r.pinned for r in self._store.records())

    def _unpinned(self, versions: Versions) -> list[int]:
        return [v for v in versions if not self._store.record(v).pinned]
