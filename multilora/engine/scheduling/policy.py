"""In which order waiting requests are looked at. Adding a policy is a function and a line in the table."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the table is where --schedule-policy finds its choices, so importing it must be light
    from multilora.engine.scheduling.request import Request

Policy = Callable[[Sequence["Request"], Callable[["Request"], int]], list["Request"]]

LPM_WINDOW = 128  # matching every one of thousands of waiting requests would cost more than it brings


def fcfs(waiting: "Sequence[Request]", matched: "Callable[[Request], int]") -> "list[Request]":
    """First come, first served."""
    return list(waiting)


def lpm(waiting: "Sequence[Request]", matched: "Callable[[Request], int]") -> "list[Request]":
    """Longest prefix match first, among the oldest `LPM_WINDOW`; ties by arrival (SGLang's policy of that name)."""
    window = sorted(waiting[:LPM_WINDOW], key=lambda r: (-matched(r), r.order))
    return window + list(waiting[LPM_WINDOW:])


POLICIES: dict[str, Policy] = {"fcfs": fcfs, "lpm": lpm}
