"""The pages of running sequences: match a cached prefix, grow, give keys to full pages, release.

A `PageTable` belongs to one sequence; `KVPages` does the work on pool and prefix cache. It knows tokens and
namespaces, not requests. Called by `engine/scheduling/`.

    blocks   b0 ... b(keyed - 1) | ... b(n - 1)
             shared: the cache   | private: of this sequence alone, the last one partly filled
             has a key for them  |

A block has a page in each column of the KV layout. Those of groups with a window are given back once the window has
passed them, and are holes from then on:

    sees all [ p p p p p p p p ]
    window   [ · · · · · p p p ]   what the next token sees, and the last block that is full
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from multilora.memory.cached_block import HOLE
from multilora.memory.kv_group import most_pages
from multilora.memory.page_pool import PageKind, PagePool
from multilora.memory.prefix_cache import NamespaceOf, PrefixCache
from multilora.memory.reclaim import Reclaimer


@dataclass
class PageTable:
    """Arena pages of one sequence, block after block, see `cached_block.py`. The first `keyed` blocks have been
    offered to the prefix cache; left: by group, how many of the first blocks it has left behind its window."""

    pages: list[int] = field(default_factory=list)
    keyed: int = 0
    left: dict[int, int] = field(default_factory=dict)


class KVPages:
    """Pages for sequences of tokens, `page_size` tokens to a block."""

    def __init__(
        self, pool: PagePool, prefix: PrefixCache, reclaimer: Reclaimer, page_bytes: int, on_their_way: int = 0
    ):
        """on_their_way: the most tokens of a sequence that are being computed at a time."""
        self.page_bytes = page_bytes
        self.pool = pool
        self.prefix = prefix
        self.reclaimer = reclaimer
        self.page_size = prefix.page_size
        self.columns = prefix.columns
        self._on_their_way = on_their_way
        self._windowed = [g for g, group in enumerate(prefix.groups) if group.window is not None]

    def most_pages(self, tokens: int) -> int:
        """The most pages that a sequence of so many tokens holds at a time."""
        return most_pages(self.prefix.groups, self.page_size, tokens, self._on_their_way)

    def match(self, tokens: Sequence[int], namespace_of: NamespaceOf, limit: int, salt: str) -> list[int]:
        """Cached pages of the longest usable prefix within the first `limit` tokens. Takes no reference."""
        return self.prefix.match(tokens, namespace_of, limit, salt) if self.prefix.enabled else []

    def blocks(self, pages: list[int]) -> int:
        """How many blocks these pages are."""
        return len(pages) // self.columns

    def start(self, matched: list[int]) -> PageTable:
        """A new table that begins with these matched pages, on which it takes references."""
        self.prefix.acquire(matched)  # before any eviction can run: matched pages may be idle
        blocks, size, groups = self.blocks(matched), self.page_size, self.prefix.groups
        left = {g: groups[g].first_block(blocks * size, size) for g in self._windowed}
        return PageTable(list(matched), blocks, left)

    def held(self, pages: list[int]) -> int:
        """How many pages these are, without the holes."""
        return len(pages) - pages.count(HOLE) if self._windowed else len(pages)

    def idle_pages(self, pages: list[int]) -> int:
        """How many of these matched pages no sequence holds."""
        return sum(page != HOLE and self.pool.kind(page) is PageKind.PREFIX for page in pages)

    def grow(self, table: PageTable, tokens: int, fence: int) -> bool:
        """Make the table hold `tokens` tokens, evicting idle pages if need be. False, and nothing has changed, if
        the pool cannot give so many. fence: the last step launched so far."""
        need = -(-tokens // self.page_size) * self.columns - len(table.pages)
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
        """The first `num_computed` tokens are in their pages: blocks newly filled get keys, so that they can serve
        other sequences. tokens: called only if there are such blocks."""
        full = num_computed // self.page_size
        if full > table.keyed:  # [keyed, full) moves from private to shared; insert() may swap in equal cached pages
            known = tokens()[: full * self.page_size]
            self.prefix.insert(known, table.pages, namespace_of, table.keyed, fence, salt)
            table.keyed = full

    def leave_windows(self, table: PageTable, num_computed: int, fence: int) -> None:
        """Give back what no token behind the first `num_computed` sees: [left, first) becomes holes. The last full
        block stays, because the next one gets its key from it. Steps up to `fence` may still use them."""
        for g in self._windowed:
            first = self.prefix.groups[g].first_block(num_computed, self.page_size)
            first = min(first, num_computed // self.page_size - 1)
            left = table.left.get(g, 0)
            if first > left:
                self.prefix.leave(table.pages, g, range(left, first), fence)
                table.left[g] = first

    def release(self, table: PageTable, fence: int) -> None:
        """Release all pages: the sequence is over or preempted. Steps up to `fence` may still use them."""
        self.prefix.release(table.pages, fence)
        table.pages, table.keyed, table.left = [], 0, {}
