"""The host tier: packed adapters in host memory, bounded by number and by bytes.

Entries that are pinned, or locked because a request waits for their copy to the device, stay. Everything else gives
way least recently used first; the adapter stays registered and is fetched again when somebody asks for it.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from multilora.lora.panels import PanelLayout


@dataclass
class HostEntry:
    """buffer: uint8 [layout.num_pages, page_bytes], ready to copy."""

    layout: PanelLayout
    buffer: torch.Tensor
    pinned: bool = False
    locked: bool = False

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()


class HostCache:
    """version → HostEntry, in order of use."""

    def __init__(self, max_count: int | None, max_bytes: int | None):
        self.max_count = max_count
        self.max_bytes = max_bytes
        self._entries: OrderedDict[int, HostEntry] = OrderedDict()
        self._bytes = 0

    def get(self, version: int) -> HostEntry | None:
        """The entry, counted as used now."""
        entry = self._entries.get(version)
        if entry is not None:
            self._entries.move_to_end(version)
        return entry

    def peek(self, version: int) -> HostEntry | None:
        return self._entries.get(version)

    def has_room_for(self, count: int, nbytes: int, *, ever: bool = False) -> bool:
        """Could `count` more entries of `nbytes` in all be held once everything that may leave has left?

        ever: suppose that what is only locked has left too.
        """
        held = [e for e in self._entries.values() if e.pinned or (e.locked and not ever)]
        return (self.max_count is None or len(held) + count <= self.max_count) and (
            self.max_bytes is None or sum(e.nbytes for e in held) + nbytes <= self.max_bytes
        )

    def put(self, version: int, entry: HostEntry) -> list[int]:
        """Add an entry; returns the versions that gave way.

        Locked entries may have come to fill the limits since the fetch began; they leave after their copy, and
        until then the limits are overstepped by what was under way.
        """
        assert version not in self._entries
        gone = []
        while self._over(entry.nbytes):
            victim = next((v for v, e in self._entries.items() if not (e.pinned or e.locked)), None)
            if victim is None:
                break
            self.remove(victim)
            gone.append(victim)
        self._entries[version] = entry
        self._bytes += entry.nbytes
        return gone

    def remove(self, version: int) -> None:
        entry = self._entries.pop(version, None)
        if entry is not None:
            self._bytes -= entry.nbytes

    def _over(self, extra: int) -> bool:
        return (self.max_count is not None and len(self._entries) + 1 > self.max_count) or (
            self.max_bytes is not None and self._bytes + extra > self.max_bytes
        )

    @property
    def nbytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, version: int) -> bool:
        return version in self._entries
