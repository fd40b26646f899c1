"""How often, and when, an engine that has ended is started again."""

from collections.abc import Callable
from time import monotonic

STABLE_SECONDS = 300.0
"""An engine that has lived so long after its start counts as sound: the next end is the first one again."""
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0


class RestartCount:
    """At most `most` restarts in a row: the first at once, the others after pauses that double.

    `total`: restarts since the server was started, as a metric shows them.
    """

    def __init__(self, most: int, clock: Callable[[], float] = monotonic):
        self.total = 0
        self._most = most
        self._clock = clock
        self._in_a_row = 0
        self._started_at: float | None = None  # the latest engine, if it came up

    def started(self) -> None:
        """An engine is up."""
        self._started_at = self._clock()

    def next_pause(self) -> float | None:
        """An engine has ended, or did not come up: count a restart. Returns the seconds to wait before it; None:
        there have been too many."""
        if self._started_at is not None and self._clock() - self._started_at >= STABLE_SECONDS:
            self._in_a_row = 0
        self._started_at = None
        if self._in_a_row >= self._most:
            return None
        self._in_a_row += 1
        self.total += 1
        if self._in_a_row == 1:
            return 0.0
        return float(min(FIRST_PAUSE_SECONDS * 2 ** (self._in_a_row - 2), LONGEST_PAUSE_SECONDS))
