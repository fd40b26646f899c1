"""Which names have a label of their own: the most used ones, so that a scrape stays small however many there are.

A name gets a label when it is first used, while there is room. Once a minute, at a scrape, a name without one takes
the place of a labelled one that was used less than half as much lately. What becomes of the counts:

    other      what names without a label have counted, since they had none
    retired    what labelled names had counted when they lost their label: unloaded, or used less than others

So all series together are always the total, and none ever goes backwards, which Prometheus would take for a restart.
A label that comes back begins at 0 like any new series. Folding it into `other` would do as well for the sum, but
rate() would show what it had counted in its life as if it had happened within a minute: `retired` has those steps to
itself. Not thread-safe.
"""

import heapq
import time
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, Self, TypeVar

OTHER = "other"
RETIRED = "retired"
RESERVED = frozenset({OTHER, RETIRED})
"""An adapter or a tenant of such a name counts as one without a label."""

RANK_SECONDS = 60.0
LEAD = 2.0
"""So many times as often as a labelled name must another have been used to take its place: labels do not flap."""
CANDIDATES = 16
"""For each label so many names without one have their use counted; of more, the least used are dropped."""


class Series(Protocol):
    """What is counted for one label."""

    def absorb(self, other: Self) -> None:
        """Add what `other` has counted."""


S = TypeVar("S", bound=Series)


class TopNames(Generic[S]):
    """`limit` names with an `S` each, made by `make`; two more for all the others."""

    def __init__(self, limit: int, make: Callable[[], S], clock: Callable[[], float] = time.monotonic):
        self.other = make()
        self.retired = make()
        self._limit = limit
        self._make = make
        self._clock = clock
        self._ranked = clock()
        self._labelled: dict[str, S] = {}
        self._use: dict[str, float] = {}  # how often each was used, halved once a minute

    def __contains__(self, name: str) -> bool:
        """Whether the name has a label of its own."""
        return name in self._labelled

    def find(self, name: str) -> S:
        """The series that `name` counts in. O(1), and gives no label."""
        return self._labelled.get(name, self.other)

    def admit(self, name: str) -> S:
        """The same; the name gets a label if there is room. O(1)."""
        found = self._labelled.get(name)
        if found is None and len(self._labelled) < self._limit and name not in RESERVED:
            found = self._labelled[name] = self._make()
        return self.other if found is None else found

    def use(self, name: str) -> S:
        """The same, for a use that counts when names are ranked. O(1), amortized."""
        self._use[name] = self._use.get(name, 0.0) + 1.0
        if len(self._use) > (CANDIDATES + 1) * self._limit:
            self._drop_candidates()
        return self.admit(name)

    def forget(self, name: str) -> None:
        """The name means nothing any more: its label goes."""
        self._use.pop(name, None)
        if (series := self._labelled.pop(name, None)) is not None:
            self.retired.absorb(series)

    def rank(self) -> None:
        """Give labels to the names that are used most, at most once a minute."""
        now = self._clock()
        if now - self._ranked < RANK_SECONDS:
            return
        self._ranked = now
        waiting = [name for name in self._use if name not in self._labelled and name not in RESERVED]
        best = heapq.nlargest(self._limit, waiting, key=self._use.__getitem__)
        worst = sorted(self._labelled, key=lambda name: self._use.get(name, 0.0))
        for name in best[: self._limit - len(worst)]:
            self._labelled[name] = self._make()
        for name, loser in zip(best[self._limit - len(worst) :], worst, strict=False):
            if self._use[name] <= LEAD * self._use.get(loser, 0.0):
                break
            self.retired.absorb(self._labelled.pop(loser))
            self._labelled[name] = self._make()
        self._use = {name: use / 2 for name, use in self._use.items() if use > 0.1}

    def items(self) -> Iterator[tuple[str, S]]:
        """Each label with its series, those of the others last."""
        yield from self._labelled.items()
        yield OTHER, self.other
        yield RETIRED, self.retired

    def series(self) -> Iterator[S]:
        """All that has been counted, in parts."""
        return (series for _, series in self.items())

    def _drop_candidates(self) -> None:
        names = heapq.nlargest(CANDIDATES // 2 * self._limit, self._use, key=self._use.__getitem__)
        self._use = {name: self._use[name] for name in (*names, *self._labelled) if name in self._use}
