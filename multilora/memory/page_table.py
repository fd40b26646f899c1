"""The pages of running sequences: match a cached prefix, grow, give keys to full pages, let go.

A `PageTable` belongs to one sequence; `KVPages` does the work on pool and prefix cache.
Called by `engine/scheduling/`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from multilora.memory.page_pool import PagePool
from multilora.memory.prefix_cache import NamespaceOf, PrefixCache
from multilora.memory.reclaim import Reclaimer


@dataclass
class PageTable:
    """Arena pages of one sequence, in token order. The first `keyed` have been offered to the prefix cache."""

    pages: list[int] = field(default_factory=list)
    keyed: int = 0


class KVPages:
    """Pages for sequences of tokens; `page_size` tokens to a page."""

    def __init__(self, pool: PagePool, prefix: PrefixCache, reclaimer: Reclaimer, page_bytes: int):
        self.page_bytes = page_bytes
        self.pool = pool
        self.prefix = prefix
        self.reclaimer = reclaimer
        self.page_size = prefix.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def match(self, tokens: Sequence[int], namespace_of: NamespaceOf, limit: int) -> list[int]:
        """Cached pages for at most the first `limit` tokens; takes no reference."""
        return self.prefix.match(tokens, namespace_of, limit) if self.prefix.enabled else []

    def start(self, matched: list[int]) -> PageTable:
        """A new table that begins with these matched pages, now in use."""
        self.prefix.acquire(matched)
        return PageTable(list(matched), len(matched))

    def grow(self, table: PageTable, tokens: int, fence: int) -> bool:
        """Make the table hold `tokens` tokens, evicting what is idle. False, and nothing changed, if that fails."""
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
    ) -> None:
        """The first `num_computed` tokens are in their pages: newly full pages can serve others from now on."""
        full = num_computed // self.page_size
        if full > table.keyed:
            self.prefix.insert(tokens()[: full * self.page_size], table.pages, namespace_of, table.keyed, fence)
            table.keyed = full

    def release(self, table: PageTable, fence: int) -> None:
        """The sequence is over or preempted. Steps up to `fence` may still use the pages."""
        self.prefix.release(table.pages, fence)
        table.pages, table.keyed = [], 0
