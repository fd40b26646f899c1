"""The host tier: adapters in host memory, packed or ready for a GPU to pack, bounded by number and by bytes.

Entries of pinned adapters stay, and those of adapters that a request has asked for in this plan or that are being
copied (`AdapterVersion.keep_reason`). Other entries are evicted, the least recently used first; the adapter stays
registered and is fetched again when a request asks for it.
"""

from collections import OrderedDict
from collections.abc import Collection

from multilora.adapters.host.mapping import HostEntry
from multilora.adapters.lifecycle.version import AdapterVersion, State


class HostTier:
    """Those that are not pinned are kept in the order of their use. max_count, max_bytes: None: no limit."""

    def __init__(self, max_count: int | None, max_bytes: int | None):
        self.max_count = max_count
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._pinned: dict[int, AdapterVersion] = {}
        self._pinned_bytes = 0
        self._by_use: OrderedDict[int, AdapterVersion] = OrderedDict()

    def has_room_for(self, count: int, nbytes: int, kept: Collection[AdapterVersion] = ()) -> bool:
        """Could `count` more entries of `nbytes` in all be held once everything has been evicted but the pinned ones
        and those of `kept`, which are not pinned?"""
        kept_bytes = sum(adapter.host.nbytes for adapter in kept if adapter.host)
        return (self.max_count is None or len(self._pinned) + len(kept) + count <= self.max_count) and (
            self.max_bytes is None or self._pinned_bytes + kept_bytes + nbytes <= self.max_bytes
        )

    def add(self, adapter: AdapterVersion, entry: HostEntry) -> None:
        """Hold its bytes; evict others for it. The caller moves it to ON_HOST.

        Entries that must stay may have come to fill the limits since the fetch began; they leave after their copy,
        and until then the limits are overstepped by what was under way.
        """
        assert adapter.host is None
        while self._over(entry.nbytes):
            victim = next((a for a in self._by_use.values() if a.host_evictable), None)
            if victim is None:
                break
            self._evict(victim)
        adapter.host = entry
        self.nbytes += entry.nbytes
        if adapter.pinned:
            self._pinned[adapter.version] = adapter
            self._pinned_bytes += entry.nbytes
        else:
            self._by_use[adapter.version] = adapter

    def touch(self, adapter: AdapterVersion) -> None:
        """Count it as used now."""
        if not adapter.pinned:
            self._by_use.move_to_end(adapter.version)

    def remove(self, adapter: AdapterVersion) -> None:
        """Free its bytes, if it has any here. A copy that reads them keeps them until it is done."""
        if adapter.host is None:
            return
        self.nbytes -= adapter.host.nbytes
        if adapter.pinned:
            del self._pinned[adapter.version]
            self._pinned_bytes -= adapter.host.nbytes
        else:
            del self._by_use[adapter.version]
        adapter.host = None

    def _evict(self, adapter: AdapterVersion) -> None:
        self.remove(adapter)
        if adapter.state is State.RESIDENT:
            adapter.changed()
        else:
            adapter.move(State.REGISTERED)

    def _over(self, extra: int) -> bool:
        return (self.max_count is not None and len(self) + 1 > self.max_count) or (
            self.max_bytes is not None and self.nbytes + extra > self.max_bytes
        )

    def __len__(self) -> int:
        return len(self._pinned) + len(self._by_use)

    def versions(self) -> list[int]:
        """Those held here: the pinned ones first, then the others, the least recently used first."""
        return [*self._pinned, *self._by_use]

    def check(self) -> None:
        """Raise AssertionError if the books do not balance."""
        pinned = sum(a.host.nbytes for a in self._pinned.values() if a.host)
        others = sum(a.host.nbytes for a in self._by_use.values() if a.host)
        assert all(a.host for a in (*self._pinned.values(), *self._by_use.values()))
        assert (self._pinned_bytes, self.nbytes) == (pinned, pinned + others)
