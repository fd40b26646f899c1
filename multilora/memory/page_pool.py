"""Who owns each page of the arena. The pool states its equation and checks it.

    free + kv + prefix + adapter == total

A page freed at step N may be reused by the compute stream at once (later steps run after N), but by any other stream
only when step N has completed: that is the fence. On CPU a fence is the step's number, too. The pool knows owners by
kind, not by name, and nothing of what the pages hold. Not thread-safe.
Called by `memory/` and `adapters/lifecycle/device_tier.py`.
"""

from collections import deque
from collections.abc import Iterable
from enum import IntEnum


class PageKind(IntEnum):
    """What a page is used for."""

    FREE = 0
    KV = 1  # held by at least one running request
    PREFIX = 2  # idle, kept for a later request with the same prefix
    ADAPTER = 3


class PagePool:
    """The books of `total` pages, numbered from 0."""

    def __init__(self, total: int):
        self.total = total
        self.completed = 0  # the last step that has finished on the device
        self._kind = [PageKind.FREE] * total
        self._count = dict.fromkeys(PageKind, 0) | {PageKind.FREE: total}
        self._ready = list(range(total - 1, -1, -1))  # free for any stream, used as a stack
        self._fenced: deque[tuple[int, int]] = deque()  # (fence, page), fences ascending: free for compute only

    def count(self, kind: PageKind) -> int:
        """Pages of this kind."""
        return self._count[kind]

    @property
    def free(self) -> int:
        """Pages that the compute stream may write now."""
        return self._count[PageKind.FREE]

    @property
    def ready(self) -> int:
        """Free pages that any stream may write now."""
        return len(self._ready)

    def alloc_kv(self, n: int) -> list[int]:
        """n pages for the compute stream. The caller has made sure that `free >= n`."""
        # fenced pages first: steps queue on one stream, so a step that writes one runs after those that read it
        pages = [self._fenced.popleft()[1] if self._fenced else self._ready.pop() for _ in range(n)]
        return self._take(pages, PageKind.KV)

    def alloc_adapter(self, n: int) -> list[int]:
        """n pages that a copy stream will write. The caller has made sure that `ready >= n`."""
        # never a fenced page: a step in flight may still read it while the copy writes
        return self._take([self._ready.pop() for _ in range(n)], PageKind.ADAPTER)

    def _take(self, pages: list[int], kind: PageKind) -> list[int]:
        for page in pages:
            assert self._kind[page] is PageKind.FREE, f"page {page} was not free"
            self._set(page, kind)
        return pages

    def free_pages(self, pages: Iterable[int], fence: int) -> None:
        """Give pages back. fence: the last step launched so far, which may still use them."""
        assert not self._fenced or fence >= self._fenced[-1][0], "fences must not go back"
        for page in pages:
            assert self._kind[page] is not PageKind.FREE, f"page {page} freed twice"
            self._set(page, PageKind.FREE)
            if fence <= self.completed:  # nothing in flight uses it
                self._ready.append(page)
            else:
                self._fenced.append((fence, page))

    def move(self, page: int, kind: PageKind) -> None:
        """Change a page between KV and PREFIX: its last request has released it, or a first one has acquired it."""
        assert {self._kind[page], kind} == {PageKind.KV, PageKind.PREFIX}, "only kv ↔ prefix"
        self._set(page, kind)

    def kind(self, page: int) -> PageKind:
        """What the page is used for now."""
        return self._kind[page]

    def complete(self, step: int) -> None:
        """Step `step`, and all before it, have finished on the device: pages fenced by them are ready."""
        assert step >= self.completed
        self.completed = step
        while self._fenced and self._fenced[0][0] <= step:
            self._ready.append(self._fenced.popleft()[1])

    def _set(self, page: int, kind: PageKind) -> None:
        self._count[self._kind[page]] -= 1
        self._count[kind] += 1
        self._kind[page] = kind

    def check(self) -> None:
        """Raise AssertionError if the books do not balance. O(total), so for tests and for an idle engine."""
        actual = {kind: self._kind.count(kind) for kind in PageKind}
        assert actual == self._count, f"page counts drifted: {self._count} recorded, {actual} found"
        assert sum(self._count.values()) == self.total
        free = self._ready + [page for _, page in self._fenced]
        assert len(free) == len(set(free)) == self.free, "the free lists do not match"
        kinds = [self._kind[page] for page in free]
        assert kinds.count(PageKind.FREE) == len(free), "a used page is in a free list"
