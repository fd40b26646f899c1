"""The pages of running sequences: match a cached prefix, grow, give keys to full pages, release.

A `PageTable` belongs to one sequence; `KVPages` does the work on pool and prefix cache. It knows tokens and
namespaces, not requests. Called by `engine/scheduling/`.

    pages    p0 ... p(keyed - 1) | ... p(n - 1)
             shared: the cache   | private: of this sequence alone, the last one partly filled
             has a key for them  |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from multilora.memory.page_pool import PageKind, PagePool
from multilora.memory.prefix_cache import NamespaceOf, PrefixCache
from multilora.memory.reclaim import Reclaimer


@dataclass
class PageTable:
    """Arena pages of one sequence, in token order. The first `keyed` have been offered to the prefix cache."""

    pages: list[int] = field(default_factory=list)
    keyed: int = 0


class KVPages:
    """Pages for sequences of tokens, `page_size` tokens to a page."""

    def __init__(self, pool: PagePool, prefix: PrefixCache, reclaimer: Reclaimer, page_bytes: int):
        self.page_bytes = page_bytes
        self.pool = pool
        self.prefix = prefix
        self.reclaimer = reclaimer
        self.page_size = prefix.page_size

    def pages_for(self, tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-tokens // self.page_size)

    def match(self, tokens: Sequence[int], namespace_of: NamespaceOf, limit: int, salt: str) -> list[int]:
        """Cached pages of the longest known prefix within the first `limit` tokens. Takes no reference."""
        return self.prefix.match(tokens, namespace_of, limit, salt) if self.prefix.enabled else []

    def start(self, matched: list[int]) -> PageTable:
        """A new table that begins with these matched pages, on which it takes references."""
        self.prefix.acquire(matched)  # before any eviction can run: matched pages may be idle
        return PageTable(list(matched), len(matched))

    def idle_pages(self, pages: list[int]) -> int:
        """How many of these matched pages no sequence holds."""
        return sum(self.pool.kind(page) is PageKind.PREFIX for page in pages)

    def grow(self, table: PageTable, tokens: int, fence: int) -> bool:
        """Make the table hold `tokens` tokens, evicting idle pages if need be. False, and nothing has changed, if
        the pool cannot give so many. fence: the last step launched so far."""
        need = self.pages_for(tokens) - len(table.pages)
        if need <= 0:
            return True
        if not self.reclaimer.ensure(need, fence):
            return False
        table.pages += self.pool.alloc_kv(need)
        return True

    def commit(
        self,
        table: PageTable,
        num_computed: int,
        tokens: Callable[[], Sequence[int]],
        namespace_of: NamespaceOf,
        fence: int,
        salt: str,
    ) -> None:
        """The first `num_computed` tokens are in their pages: pages newly filled get keys, so that they can serve
        other sequences. tokens: called only if there are such pages."""
        full = num_computed // self.page_size
        if full > table.keyed:  # [keyed, full) moves from private to shared; insert() may swap in equal cached pages
            known = tokens()[: full * self.page_size]
            self.prefix.insert(known, table.pages, namespace_of, table.keyed, fence, salt)
            table.keyed = full

    def release(self, table: PageTable, fence: int) -> None:
        """Release all pages: the sequence is over or preempted. Steps up to `fence` may still use them."""
        self.prefix.release(table.pages, fence)
        table.pages, table.keyed = [], 0
