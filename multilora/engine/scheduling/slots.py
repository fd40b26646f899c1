"""Which request has which slot: the small integer under which a runner keeps what lasts from step to step.

    acquired, with the sampling state        released: the request has ended     every step with it has been read
    ------------- in use, preempted or not ------------|------- leaving ----------------------| free

A slot is not given to another request while a step with the old one is in flight: reading that step still changes
what the sampler keeps there. Called by `scheduler.py`.
"""

import heapq
from collections import deque


class Slots:
    def __init__(self) -> None:
        self._free: list[int] = []  # a heap: low numbers first, so that tables stay small
        self._count = 0
        self._leaving: deque[tuple[int, int]] = deque()  # (fence, slot), fences ascending

    def acquire(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._count += 1
        return self._count - 1

    def release(self, slot: int, fence: int) -> None:
        """The request has ended; `fence` is the last step launched, which may still sample for it."""
        self._leaving.append((fence, slot))

    def recycle(self, completed: int) -> list[int]:
        """Slots whose last step has been read by now: the next plan frees them, and may give them out again."""
        recycled = []
        while self._leaving and self._leaving[0][0] <= completed:
            recycled.append(self._leaving.popleft()[1])
            heapq.heappush(self._free, recycled[-1])
        return recycled
