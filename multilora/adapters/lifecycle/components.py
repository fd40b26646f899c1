"""What a request asks of the adapter store: all adapters of its composition at once, or none of them.

A composition waits until every component can be resident beside the others; until then it keeps no slot from others.
So that two compositions can never wait for each other, components are kept for one only within one plan, oldest
request first. Versions come in ascending order; none of them is the base model.
"""

from collections.abc import Sequence

from multilora.adapters.lifecycle.disabled import AnyStore
from multilora.adapters.lifecycle.store import LoadStatus
from multilora.adapters.lifecycle.version import State
from multilora.errors import CannotFit
from multilora.memory.page_table import KVPages

Versions = Sequence[int]


class Components:
    """With LoRA off, `store` is the one that refuses, and every request has no versions: the base model only."""

    def __init__(self, store: AnyStore, kv: KVPages):
        self._store = store
        self._kv = kv

    def begin_plan(self) -> None:
        self._store.begin_plan()

    # ------------------------------------------------------------------ what a request counts for

    def count_request(self, versions: Versions) -> None:
        """A request asks for them for the first time."""
        for version in versions:
            self._store.get(version).count_request()

    def count_waiting(self, versions: Versions, change: int) -> None:
        """`change` more requests for them are in the queue than before."""
        for version in versions:
            self._store.get(version).count_waiting(change)

    def count_demand(self, versions: Versions, change: int) -> None:
        """`change` more waiting requests than before will ask for them soon: others are evicted before them."""
        for version in versions:
            self._store.device.count_demand(self._store.get(version), change)

    # ------------------------------------------------------------------ one for another

    def can_replace(self, version: int, successor: int, *, composed: bool) -> bool:
        """Whether a request in the middle of its answer can go on with the successor: it must act from the same
        token on, and on the same vocabulary. composed: it is not all that acts, or has a weight."""
        old, new = self._store.get(version), self._store.get(successor)
        return (
            old.invocation_tokens == new.invocation_tokens
            and old.vocab_size == new.vocab_size
            and old.num_labels == new.num_labels
            and not (old.trains_tokens or new.trains_tokens)
            and not (composed and new.not_composable_reason)
        )

    def in_use(self, version: int) -> bool:
        """Whether a request runs on it, or waits for it."""
        return self._store.known(version) and bool(self._store.get(version).refs or self._store.get(version).waiting)

    # ------------------------------------------------------------------ bringing them in

    def ready(self, versions: Versions) -> bool:
        """Are all resident? Changes nothing."""
        return all(self._store.get(v).state is State.RESIDENT for v in versions)

    def seconds_left(self, versions: Versions) -> float | None:
        """Until all are resident, if what is missing is being copied and that can be judged."""
        missing = [v for v in versions if not self.ready((v,))]
        left = [self._store.device.seconds_left(v) for v in missing]
        known = [seconds for seconds in left if seconds is not None]
        return max(known, default=0.0) if len(known) == len(missing) else None

    def request_load(self, versions: Versions, fence: int, *, urgent: bool = False, spare: int = 0) -> LoadStatus:
        """Are all resident? If not, do the next thing that brings them nearer. urgent, spare: see the store."""
        if not versions:
            return LoadStatus.READY
        if len(versions) == 1:
            return self._store.request_load(versions[0], fence, urgent=urgent, spare=spare)
        claimed = [v for v in versions if self._store.claim_on_device(v)]
        missing = [v for v in versions if self._store.get(v).device is None]
        if missing and not self._have_room(missing, urgent, spare):
            self._store.unclaim(claimed)
            for version in missing:
                if self._store.get(version).host is None:
                    self._store.request_load(version, fence)  # as far as host memory
            return LoadStatus.BLOCKED
        found = set()
        for version in versions:
            found.add(self._store.request_load(version, fence, urgent=urgent, spare=spare))
            self._store.claim_on_device(version)
        return next(w for w in (LoadStatus.BLOCKED, LoadStatus.COMING, LoadStatus.READY) if w in found)

    def _have_room(self, versions: Versions, urgent: bool, spare: int) -> bool:
        available = self._kv.reclaimer.available() - spare
        return self._store.device.has_room_for(self._pages(versions), available, len(versions), urgent=urgent)

    def nearest_to_idle(self, versions: Versions) -> set[int]:
        """Other adapters in use, as many as `versions`, that will be idle soonest if nothing more starts on them."""
        return self._store.device.nearest_to_idle(len(versions), versions)

    def acquire_slots(self, versions: Versions) -> None:
        """A request runs on them until `release_slots`. All are resident."""
        for version in versions:
            self._store.device.acquire_slot(self._store.get(version))

    def release_slots(self, versions: Versions) -> None:
        for version in versions:
            self._store.device.release_slot(self._store.get(version))

    def idle_pages(self, versions: Versions) -> int:
        """Pages of those that could be evicted now."""
        return self._pages([v for v in versions if self._store.get(v).device_evictable])

    def slots(self, versions: Versions) -> tuple[int, ...]:
        """Their slots in the LoRA table; all are resident."""
        return tuple([self._store.get(v).slot for v in versions])

    # ------------------------------------------------------------------ what could never run

    def check_fit(self, versions: Versions, tokens: int) -> None:
        """Raise CannotFit for what could never run, even alone, beside the adapters that are pinned."""
        kv = self._kv
        room = kv.pool.total - self._store.pinned_pages
        unpinned = [v for v in versions if not self._store.get(v).pinned]
        adapters = self._pages(unpinned)
        if len(versions) > 1:
            self._check_limits(len(versions), len(unpinned), adapters)
        need = kv.most_pages(tokens) + adapters
        if need > room:
            raise CannotFit(
                f"prompt, max_new_tokens and adapters need {need} pages of {kv.page_size} tokens; {room} of "
                f"{kv.pool.total} are not pinned: lower max_new_tokens, or start with a larger --arena-bytes"
            )

    def _check_limits(self, count: int, unpinned: int, pages: int) -> None:
        """Raise CannotFit for a composition of `count` adapters, of which those not pinned take `pages`, over the
        device's limits. Loading and pinning made sure of a single adapter only."""
        device = self._store.device
        if device.max_count is not None and unpinned > (slots := device.max_count - self._store.pinned_count):
            raise CannotFit(
                f"a composition of {count} adapters: --max-loras-per-batch {device.max_count} and the "
                f"pinned adapters leave room for {slots} that are not pinned",
                param="lora_path",
            )
        if device.max_pages is not None and pages > (room := device.max_pages - self._store.pinned_pages):
            raise CannotFit(
                f"a composition of {pages} pages of adapters; --lora-device-bytes and the pinned adapters leave "
                f"{room}",
                param="lora_path",
            )

    def _pages(self, versions: Versions) -> int:
        return sum(self._store.get(v).pages for v in versions)
