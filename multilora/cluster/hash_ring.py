"""A ring of consistent hashes: for each key the members in an order of its own, which hardly moves with the members.

Removing a member moves only the keys that were its own; a new one takes its share from all others alike. Knows
nothing of load: `adapter_router.py` walks on where a member is full (consistent hashing with bounded loads; Mirrokni,
Thorup and Zadimoghaddam, SODA 2018).
"""

import bisect
from collections.abc import Iterator
from hashlib import blake2b

POINTS = 64  # of a member of weight 1: the shares of 100 members differ by a factor of 1.3 or so


class HashRing:
    """Members may be of any weight: one of weight 2 gets twice the keys. The ring is put in order when it is next
    walked, so adding many members costs what adding one does."""

    def __init__(self) -> None:
        self._own: dict[str, list[int]] = {}  # the points of each member
        self._points: list[int] = []
        self._owners: list[str] = []
        self._in_order = True

    def __len__(self) -> int:
        return len(self._own)

    def add(self, member: str, weight: float = 1.0) -> None:
        """The member is there from now on; one that is there already stays as it is."""
        if member not in self._own:
            self._own[member] = [stable_hash(f"{member}#{i}") for i in range(max(1, round(POINTS * weight)))]
            self._in_order = False

    def remove(self, member: str) -> None:
        """The member is gone; one that is unknown is ignored."""
        if self._own.pop(member, None) is not None:
            self._in_order = False

    def walk(self, key: str) -> Iterator[str]:
        """Every member once, in the order of this key. The first few cost a few steps each."""
        if not self._in_order:
            self._put_in_order()
        start, seen = bisect.bisect_left(self._points, stable_hash(key)), set[str]()
        for step in range(len(self._owners)):
            owner = self._owners[(start + step) % len(self._owners)]
            if owner not in seen:
                seen.add(owner)
                yield owner

    def _put_in_order(self) -> None:
        pairs = sorted((point, member) for member, points in self._own.items() for point in points)
        self._points = [point for point, _ in pairs]
        self._owners = [member for _, member in pairs]
        self._in_order = True


def stable_hash(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
