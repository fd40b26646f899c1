"""Virtual token counters (VTC; Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): competitors
that are served in turn, the one that has received least first.

A counter says how much its competitor has received, divided by its weight. It only grows. Who comes back after a time
with nothing to do starts where the least served of the others stands: no credit is saved up, and none is owed.

Owns the counters and which of them compete now. Does not know what is served, nor what it costs: `fair.py` does.
"""

import itertools
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from heapq import heappop, heappush, heapreplace
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
C = TypeVar("C", bound="Competitor")
R = TypeVar("R")

SWEEP = 1024  # competitors that are remembered before the first sweep


class Competitor:
    """One of those that are served in turn. counter: what it has received, over its weight; whoever serves it adds to
    it. competes: whether it has anything to be served now. held: by how many unfinished requests it is needed."""

    __slots__ = ("competes", "counter", "held", "listed", "weight")

    def __init__(self, weight: float = 1.0):
        self.weight = weight
        self.counter = 0.0
        self.competes = False
        self.held = 0
        self.listed = False  # whether the heap has an entry for it


class Counters(Generic[K, C]):
    """The competitors by key, and a heap of those that compete.

    Charging does not touch the heap: the counter in an entry is the one at the time of its last look, so never too
    high, and an entry that comes to the top with a lower one than its competitor's is put back. Each has one entry at
    most. make: a new competitor.
    """

    def __init__(self, make: Callable[[K], C]):
        self._make = make
        self._members: dict[K, C] = {}
        self._heap: list[tuple[float, int, C]] = []  # counter when pushed, tie-break
        self._pushes = 0
        self._floor = 0.0  # no competitor starts below it; never falls
        self._last: C | None = None  # the last that stopped competing
        self._sweep_at = SWEEP

    def __len__(self) -> int:
        return len(self._members)

    @property
    def only(self) -> C | None:
        """The one competitor, if there is just one that is remembered."""
        return next(iter(self._members.values())) if len(self._members) == 1 else None

    def items(self) -> Iterable[tuple[K, C]]:
        """Those that are remembered."""
        return self._members.items()

    def get(self, key: K) -> C | None:
        """The competitor, if it is remembered."""
        return self._members.get(key)

    def hold(self, key: K) -> C:
        """The competitor, which is remembered until `release`."""
        member = self._members.get(key)
        if member is None:
            member = self._members[key] = self._make(key)
        member.held += 1
        return member

    def release(self, member: C) -> None:
        """One request less needs it. Competitors that nobody needs are forgotten as soon as that changes nothing."""
        member.held -= 1
        if not member.held and len(self._members) > self._sweep_at:
            self._sweep()

    def enter(self, member: C) -> None:
        """It competes from now on, and starts no lower than the least of those that do; if none does, no lower than
        the one that did last."""
        if member.competes:
            return
        member.counter = max(member.counter, self.least())
        member.competes = True
        if not member.listed:
            self._push(member)

    def leave(self, member: C) -> None:
        """It has nothing more to be served."""
        if member.competes:
            member.competes = False
            self._last = member

    def least(self) -> float:
        """The lowest counter of those that compete; where none does, where a newcomer starts."""
        first = self.first()
        if first is not None:
            self._floor = max(self._floor, first.counter)
        elif self._last is not None:
            self._floor = max(self._floor, self._last.counter)
        return self._floor

    def first(self) -> C | None:
        """The competitor that has received least; of equals the one that competes for the longest time."""
        heap = self._heap
        while heap:
            counter, tie, member = heap[0]
            if not member.competes:
                heappop(heap)
                member.listed = False
            elif member.counter > counter:
                heapreplace(heap, (member.counter, tie, member))
            else:
                return member
        return None

    def _push(self, member: C) -> None:
        self._pushes += 1
        member.listed = True
        heappush(self._heap, (member.counter, self._pushes, member))

    def _sweep(self) -> None:
        """Forget those that would start at the floor anyway."""
        floor = self.least()
        kept = {key: one for key, one in self._members.items() if one.held or one.listed or one.counter > floor}
        self._members = kept
        self._sweep_at = max(SWEEP, 2 * len(kept))


def in_turn(
    counters: Counters[K, C], served: Callable[[C], Iterator[tuple[R, float]]]
) -> Generator[tuple[R, float], None, None]:
    """What those that compete would be served, in order, each charged at once for what it got: (what, cost).

    Nothing is really charged. served: what one of them would be served. While it runs the heap lacks those that were
    served, so it must be closed before anybody enters; they may leave meanwhile.
    """
    heap = counters._heap  # noqa: SLF001 - of the same module
    taken: list[tuple[float, int, C]] = []
    again: list[tuple[float, int, float, Iterator[tuple[R, float]]]] = []  # who has been served before
    try:
        for turn in itertools.count():
            first = counters.first()
            if first is not None and (not again or first.counter <= again[0][0]):
                taken.append(heappop(heap))
                counter, weight, source = first.counter, first.weight, served(first)
            elif again:
                counter, _, weight, source = heappop(again)
            else:
                return
            found = next(source, None)
            if found is not None:
                yield found
                heappush(again, (counter + found[1] / weight, turn, weight, source))
    finally:
        for entry in taken:
            heappush(heap, entry)
