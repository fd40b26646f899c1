"""Adapters on their way from disk to host memory: those that wait for the loader, and those that it works on.

As many are fetched at once as the host tier can hold when they come. The bytes of a first fetch are not known before.
"""

from collections import deque
from collections.abc import Collection, Iterable
from typing import Protocol

import torch

from multilora.adapters.lifecycle.host_tier import HostTier
from multilora.adapters.lifecycle.version import AdapterVersion, State
from multilora.adapters.loading.loader import Fetched, FetchJob, Loader
from multilora.tracing import SpanRecord


class LoadTraces(Protocol):
    """What knows for whom adapters are fetched."""

    def traceparent_of(self, version: int) -> str | None:
        """The span that a fetch of the version belongs below; None: it is not traced."""

    def fetched(self, record: SpanRecord) -> None:
        """A fetch that was traced has ended."""


class FetchQueue:
    """host_page_bytes: what a page of the arena takes on the host, for all ranks. traces: whose spans fetches belong
    below; None: nobody's."""

    def __init__(self, loader: Loader, host: HostTier, host_page_bytes: int):
        self.traces: LoadTraces | None = None
        self._loader = loader
        self._host = host
        self._host_page_bytes = host_page_bytes
        self._queued: deque[AdapterVersion] = deque()
        self._fetching: dict[int, AdapterVersion] = {}  # unloaded ones (DRAINING) included
        self._fetching_bytes = 0

    def __len__(self) -> int:
        return len(self._queued) + len(self._fetching)

    def add(self, adapter: AdapterVersion) -> None:
        """REGISTERED or FAILED → QUEUED."""
        adapter.move(State.QUEUED)
        self._queued.append(adapter)

    def remove(self, adapter: AdapterVersion) -> None:
        """One that is QUEUED is not to be fetched after all; the caller moves it to another state."""
        self._queued.remove(adapter)

    def start_fetches(self, max_bytes: int, kept: Collection[AdapterVersion]) -> list[AdapterVersion]:
        """QUEUED → FETCHING, in order, as long as the host tier has room beside its pinned entries and those of
        `kept`. Returns the ones that it could never hold beside the pinned ones, removed but still QUEUED: new ones
        only, as every pin leaves room for those that are loaded already (`TierLimits.check_pin`)."""
        hopeless = []
        while self._queued:
            adapter = self._queued[0]
            nbytes = self._nbytes(adapter)
            if not self._host.has_room_for(1, nbytes):
                hopeless.append(self._queued.popleft())
                continue
            if not self._host.has_room_for(1 + len(self._fetching), nbytes + self._fetching_bytes, kept):
                break
            self._queued.popleft()
            self._fetching[adapter.version] = adapter
            self._fetching_bytes += nbytes
            adapter.fetches += 1
            adapter.move(State.FETCHING)
            parent = None if self.traces is None else self.traces.traceparent_of(adapter.version)
            self._loader.submit(FetchJob(adapter.version, adapter.path, max_bytes, parent))
        return hopeless

    def poll_fetches(self) -> list[tuple[AdapterVersion, Fetched, torch.Tensor | None]]:
        """What the loader has finished: FETCHING, or DRAINING if it was unloaded meanwhile."""
        done = []
        for result, buffer in self._loader.poll():
            adapter = self._fetching.pop(result.version)
            self._fetching_bytes -= self._nbytes(adapter)
            if result.span is not None and self.traces is not None:
                self.traces.fetched(result.span)
            done.append((adapter, result, buffer))
        return done

    def _nbytes(self, adapter: AdapterVersion) -> int:
        return adapter.pages * self._host_page_bytes

    def check(self, adapters: Iterable[AdapterVersion]) -> None:
        """Raise AssertionError if these, all there are, are not where their states say."""
        queued = {a.version for a in adapters if a.state is State.QUEUED}
        assert sorted(a.version for a in self._queued) == sorted(queued), "a queued adapter was lost"
        fetching = {
            a.version for a in adapters if a.state is State.FETCHING or (a.state is State.DRAINING and not a.device)
        }
        assert self._fetching.keys() == fetching, "a fetch was lost"
        assert self._fetching_bytes == sum(self._nbytes(a) for a in self._fetching.values())
