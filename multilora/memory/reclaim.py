"""What is evicted when the pool runs dry: idle prefix pages and idle adapters compete under one score.

The score of an item is `clock + uses x cost per page`, taken when it was last used. The lowest score is evicted
first, and the clock moves up to it, so that old popularity fades. That is GreedyDual-Size-Frequency (Cherkasova,
"Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998), with the cost in
units of "copy one page to the device". Sources never offer what is in use or pinned; the reclaimer does not know what
it evicts. Called by `page_table.py` and `adapters/lifecycle/device_tier.py`.
"""

from collections.abc import Sequence
from typing import Protocol

from multilora.memory.page_pool import PagePool

ADAPTER_PAGE_COST = 1.0
"""The cost of bringing back one page of an adapter: one copy from host memory."""

PREFIX_PAGE_COST = 8.0
"""The cost of bringing back one page of KV, a prefill. On an H200 with Llama-3.1-8B, 16 tokens take about 0.3 ms, a
copy of the same 2 MiB 0.04 ms."""

LEFT_BEHIND_COST = 2.0
"""The same, of a page behind its window while the request that wrote it went on: it serves only a request whose text
goes another way within a window of it. A judgement, not a measurement."""


class GdsfClock:
    """The floor of all scores, which only rises; one object is shared by all that score."""

    def __init__(self) -> None:
        self.now = 0.0

    def score(self, uses: int, cost_per_page: float) -> float:
        """The score of an item used `uses` times, the last time now."""
        return self.now + min(uses, 64) * cost_per_page


class Reclaimable(Protocol):
    """A holder of idle pages that can be evicted."""

    def idle_pages(self) -> int:
        """How many pages could be evicted now, in total."""
        ...

    def peek_victim(self) -> float | None:
        """The score of what `evict` would free; None if nothing is idle."""
        ...

    def evict(self, fence: int) -> int:
        """Free the item whose score `peek_victim` returned; returns its number of pages, at least 1."""
        ...


class Reclaimer:
    """Frees idle pages until a demand is met."""

    def __init__(self, pool: PagePool, clock: GdsfClock, sources: Sequence[Reclaimable]):
        self.pool = pool
        self.clock = clock
        self.sources = sources

    def available(self) -> int:
        """Pages that are free or could be made free."""
        return self.pool.free + sum(s.idle_pages() for s in self.sources)

    def ensure(self, n: int, fence: int) -> bool:
        """Make at least n pages free (for compute). False, with nothing evicted, if that is impossible."""
        if self.pool.free >= n:
            return True  # almost always; counting idle pages costs more
        if self.available() < n:
            return False
        while self.pool.free < n:
            offers = [(score, i) for i, s in enumerate(self.sources) if (score := s.peek_victim()) is not None]
            score, i = min(offers)
            self.clock.now = max(self.clock.now, score)
            self.sources[i].evict(fence)
        return True
