"""Scheduling policies: who is looked at first, who pays for what ran, who is preempted.

Admission stands above a policy: it asks for the order of those that may start at all, starts those whose adapters
are there first, and groups requests of one adapter. Adding a policy is a class and a line in the table.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from multilora.engine.scheduling.request import Request

LPM_WINDOW = 128  # matching every one of thousands of waiting requests would cost more than it brings

Matched = Callable[[Request], int]
"""Pages of a request's tokens that the prefix cache has."""


class Policy(Protocol):
    def order(self, waiting: Sequence[Request]) -> list[Request]:
        """The waiting requests in the order in which they should start. waiting: by arrival; not changed."""
        ...

    def charge(self, request: Request, tokens: int) -> None:
        """A step with `tokens` tokens of the request goes to the device."""
        ...

    def victim(self, running: Sequence[Request]) -> Request:
        """Who is preempted when pages run out. Never the oldest of several, which must be able to finish."""
        ...


class FirstComeFirstServed:
    """Nobody is charged for anything; the youngest is preempted."""

    def __init__(self, matched: Matched):
        self._matched = matched

    def order(self, waiting: Sequence[Request]) -> list[Request]:
        return list(waiting)

    def charge(self, request: Request, tokens: int) -> None:
        del request, tokens

    def victim(self, running: Sequence[Request]) -> Request:
        return max(running, key=lambda r: r.spec.order)


class LongestPrefixMatch(FirstComeFirstServed):
    """Longest prefix match first, among the oldest `LPM_WINDOW`; ties by arrival (SGLang's policy of that name)."""

    def order(self, waiting: Sequence[Request]) -> list[Request]:
        window = sorted(waiting[:LPM_WINDOW], key=lambda r: (-self._matched(r), r.spec.order))
        return window + list(waiting[LPM_WINDOW:])


class PriorityFirst(FirstComeFirstServed):
    """The lowest number first, as in vLLM; ties by arrival. Of those that run, the one that would start last is
    preempted, but never the oldest."""

    def order(self, waiting: Sequence[Request]) -> list[Request]:
        return sorted(waiting, key=_turn)

    def victim(self, running: Sequence[Request]) -> Request:
        oldest = min(running, key=lambda r: r.spec.order)
        return max((r for r in running if r is not oldest), key=_turn, default=oldest)


def _turn(request: Request) -> tuple[int, int]:
    return request.spec.priority, request.spec.order


POLICIES: dict[str, Callable[[Matched], Policy]] = {
    "fcfs": FirstComeFirstServed,
    "lpm": LongestPrefixMatch,
    "priority": PriorityFirst,
}
