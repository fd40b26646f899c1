"""Scheduling policies: who is looked at first, who pays for what ran, who is preempted.

Admission stands above a policy: it asks for the order of those that may start at all, starts those whose adapters
are there first, and groups requests of one adapter. Adding a policy is a class and a line in the table. `fair` is in
a file of its own.
"""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from multilora.engine.scheduling.fair import EQUAL, LOOK_AT, FairShare, FairWeights
from multilora.engine.scheduling.request import Request

MAX_WAIT = 5.0  # seconds
LPM_WINDOW = 128  # matching every one of thousands of waiting requests would cost more than it brings

Matched = Callable[[Request], int]
"""Pages of a request's tokens that the prefix cache has."""


class Policy(Protocol):
    """groups: whether requests of one adapter follow each other, out of order, where adapters have to take turns.
    heeds_priority: whether a request's `priority` changes when it starts; where it does not, one that sets it is
    refused at the door."""

    groups: bool
    heeds_priority: bool

    def __init__(self, matched: Matched, max_wait: float = ..., weights: FairWeights = ...): ...

    def enqueue(self, request: Request) -> None:
        """The request waits from now on: it is new, or was preempted."""
        ...

    def dequeue(self, request: Request) -> None:
        """The request no longer waits: it starts, or ends."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended."""
        ...

    def queued_before(self, tenant: str, queued_tokens: int) -> int:
        """Prompt tokens that go before those of a new request of the tenant, at least. queued_tokens: all that
        wait."""
        ...

    def window(self, waiting: Sequence[Request], now: float, *, starting: bool) -> Sequence[Request]:
        """The waiting requests for which adapters are kept. The first one may make others yield their adapters.
        waiting: by arrival, not empty; not changed. starting: whether any of them can start in this plan."""
        ...

    def order(self, window: Sequence[Request]) -> Iterable[Request]:
        """The requests that may start, in the order in which they should. window: what `window` has just returned."""
        ...

    def overdue(self, request: Request, now: float) -> bool:
        """Whether the first of the window has waited so long that others make room for it."""
        ...

    def charge(self, request: Request, tokens: int) -> None:
        """A step with the `tokens` tokens of the request before `num_scheduled` goes to the device."""
        ...

    def charge_elsewhere(self, served: Mapping[str, float]) -> None:
        """Other engines have served tenants so much, in weighted tokens."""
        ...

    def take_served(self) -> dict[str, float]:
        """The same of this engine, since the last call."""
        ...

    def prefills(self, running: Sequence[Request]) -> Sequence[Request]:
        """Running requests with prompt left, in the order in which they get the tokens of a step."""
        ...

    def yields(self, running: Request) -> bool:
        """Whether a running prompt that could take a whole step leaves half of it to those that wait."""
        ...

    def outranked(self, waiting: Request, running: Sequence[Request]) -> Request | None:
        """All slots are taken: a running request that is preempted so that the first waiting one starts, if any."""
        ...

    def victim(self, running: Sequence[Request]) -> Request:
        """Who is preempted when pages run out. Never the oldest of several, which must be able to finish."""
        ...


class FirstComeFirstServed:
    """Nobody is charged for anything; the youngest is preempted. No request overtakes one that came more than
    `max_wait` seconds before it, whatever the order within that bound is."""

    groups = True
    heeds_priority = False

    def __init__(self, matched: Matched, max_wait: float = MAX_WAIT, weights: FairWeights = EQUAL):
        del weights
        self._matched = matched
        self._max_wait = max_wait

    def enqueue(self, request: Request) -> None:
        del request

    def dequeue(self, request: Request) -> None:
        del request

    def forget(self, request: Request) -> None:
        del request

    def queued_before(self, tenant: str, queued_tokens: int) -> int:
        del tenant
        return queued_tokens

    def window(self, waiting: Sequence[Request], now: float, *, starting: bool) -> Sequence[Request]:
        del now, starting
        latest = waiting[0].spec.arrival + self._max_wait
        end = bisect.bisect_right(waiting, latest, key=lambda r: r.spec.arrival)
        return waiting[: min(end, LOOK_AT)]

    def order(self, window: Sequence[Request]) -> Iterable[Request]:
        return window

    def overdue(self, request: Request, now: float) -> bool:
        return now - request.spec.arrival > self._max_wait

    def charge(self, request: Request, tokens: int) -> None:
        del request, tokens

    def charge_elsewhere(self, served: Mapping[str, float]) -> None:
        del served

    def take_served(self) -> dict[str, float]:
        return {}

    def prefills(self, running: Sequence[Request]) -> Sequence[Request]:
        return running

    def yields(self, running: Request) -> bool:
        del running
        return False

    def outranked(self, waiting: Request, running: Sequence[Request]) -> Request | None:
        del waiting, running
        return None

    def victim(self, running: Sequence[Request]) -> Request:
        return max(running, key=lambda r: r.spec.order)


class LongestPrefixMatch(FirstComeFirstServed):
    """Longest prefix match first, among the oldest `LPM_WINDOW`; ties by arrival (SGLang's policy of that name)."""

    def queued_before(self, tenant: str, queued_tokens: int) -> int:
        del tenant, queued_tokens
        return 0  # its prefix may be the longest

    def order(self, window: Sequence[Request]) -> Iterable[Request]:
        first = sorted(window[:LPM_WINDOW], key=lambda r: (-self._matched(r), r.spec.order))
        return first + list(window[LPM_WINDOW:])


class PriorityFirst(FirstComeFirstServed):
    """The lowest number first, as in vLLM; ties by arrival. Of those that run, the one that would start last is
    preempted, but never the oldest."""

    heeds_priority = True

    def queued_before(self, tenant: str, queued_tokens: int) -> int:
        del tenant, queued_tokens
        return 0  # its number may be the lowest

    def order(self, window: Sequence[Request]) -> Iterable[Request]:
        return sorted(window, key=_turn)

    def victim(self, running: Sequence[Request]) -> Request:
        oldest = min(running, key=lambda r: r.spec.order)
        return max((r for r in running if r is not oldest), key=_turn, default=oldest)


def _turn(request: Request) -> tuple[int, int]:
    return request.spec.priority, request.spec.order


POLICIES: dict[str, type[Policy]] = {
    "fair": FairShare,
    "fcfs": FirstComeFirstServed,
    "lpm": LongestPrefixMatch,
    "priority": PriorityFirst,
}
"""The policies by name; each is made of what the prefix cache has, `max_wait` in seconds, and `fair`'s weights."""
