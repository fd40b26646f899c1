"""When adapters that are being copied to the device will be there, judged by how long the last copies took.

Copies share one link and are done one after the other. What is polled is seen late, never early, so the fastest of
the recent copies says most. Called by `residency.py`; admission reads it.
"""

from collections.abc import Callable, Iterable
from time import monotonic

FORGET = 0.95  # of the rate that is remembered, with every copy


class CopyForecast:
    def __init__(self, now: Callable[[], float] = monotonic):
        self._now = now
        self._copying: dict[int, tuple[int, float]] = {}  # version → bytes, since when; in order
        self._free_at = 0.0  # when the link was last seen to be done with one
        self._rate = 0.0  # bytes a second, 0: not known yet

    def started(self, version: int, nbytes: int) -> None:
        self._copying[version] = nbytes, self._now()

    def finished(self, versions: Iterable[int]) -> None:
        """They were found to be done at the same moment."""
        done = [self._copying.pop(version) for version in versions]
        if not done:
            return
        now = self._now()
        seconds = now - max(self._free_at, min(since for _, since in done))
        self._free_at = now
        if seconds > 0:
            self._rate = max(self._rate * FORGET, sum(nbytes for nbytes, _ in done) / seconds)

    def seconds_left(self, version: int) -> float | None:
        """None: it is not being copied, or nothing is known yet."""
        if version not in self._copying or not self._rate:
            return None
        before, begun = 0, None
        for other, (nbytes, since) in self._copying.items():
            begun = since if begun is None else begun
            before += nbytes
            if other == version:
                break
        assert begun is not None
        return max(0.0, before / self._rate - (self._now() - max(self._free_at, begun)))

    @property
    def copying(self) -> bool:
        return bool(self._copying)
