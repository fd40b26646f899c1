"""When adapters that are being copied to the device will be there, judged by how long the last copies took.

Copies share one link and are done one after the other. A copy is seen to be done late, never early, so the fastest of
the recent copies says most. `CopyForecast` remembers the link's rate only; the device tier knows what is in flight.
"""

from collections.abc import Callable, Sequence
from time import monotonic

from multilora.adapters.device.copier import CopyInFlight

FORGET = 0.95
"""Share of the remembered rate that is kept with every copy."""


class CopyForecast:
    def __init__(self, now: Callable[[], float] = monotonic):
        self.now = now
        self._free_at = 0.0  # when the link was last seen to be done with a copy
        self._rate = 0.0  # bytes a second; 0: not known yet

    def observe(self, done: Sequence[CopyInFlight]) -> None:
        """These copies, in the order of their starts, were found to be done at the same moment: now."""
        if not done:
            return
        now = self.now()
        seconds = now - max(self._free_at, done[0].started_at)
        self._free_at = now
        if seconds > 0:
            self._rate = max(self._rate * FORGET, sum(copy.nbytes for copy in done) / seconds)

    def seconds_left(self, copies: Sequence[CopyInFlight]) -> float | None:
        """Seconds until all of these, the first in flight, are done. None: the link's rate is not known yet."""
        if not self._rate:
            return None
        begun = max(self._free_at, copies[0].started_at)
        return max(0.0, sum(copy.nbytes for copy in copies) / self._rate - (self.now() - begun))
