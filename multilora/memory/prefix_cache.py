"""Prefix cache in whole pages: which page holds the KV of which tokens after which prefix.

A page's key is (parent page's node, token ids, namespace, salt), compared exactly, so two different prefixes can
never be taken for each other. The namespace is a property of the page: the base model and every adapter *version*
have their own. The salt is the client's: requests share pages only with requests of the same salt. Pages in use have
a reference count; at zero they become idle and may be evicted, leaves first. The cache knows what a namespace equals,
not what it means. Called by `page_table.py` and `engine/build.py`.

    request A   [p0]──[p1]──[p2]──(p7: partial, private to A)
    request B   [p0]──[p1]──[p5]──(p9)
                  refs 2     refs 1
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from multilora.memory.page_pool import PageKind, PagePool
from multilora.memory.reclaim import PREFIX_PAGE_COST, GdsfClock

PageKey = tuple[int, tuple[int, ...], int, str]  # parent node id, tokens, namespace, salt
NamespaceOf = Callable[[int], int]  # page index in the sequence → namespace
ROOT = 0


@dataclass(eq=False)
class Node:
    """One cached page. `id` is never reused, so keys of children stay exact after eviction."""

    id: int
    key: PageKey
    page: int
    parent: "Node | None"
    refs: int = 0
    children: int = 0
    uses: int = 1
    score: float = 0.0
    orphan: bool = False  # its namespace was dropped: nobody finds it, and it is freed when it is released


class PrefixCache:
    """Owns the KV pages that have a key. Private (partial) pages belong to their request."""

    def __init__(self, pool: PagePool, clock: GdsfClock, page_size: int, enabled: bool = True):
        self.pool = pool
        self.clock = clock
        self.page_size = page_size
        self.enabled = enabled
        self._nodes: dict[PageKey, Node] = {}
        self._by_page: dict[int, Node] = {}
        self._by_namespace: dict[int, dict[int, Node]] = {}  # namespace → node id → node
        self._heap: list[tuple[float, int, Node]] = []  # idle leaves by score; stale entries are skipped when popped
        self._next_id = ROOT + 1

    # ------------------------------------------------------------------ for requests

    def match(self, tokens: Sequence[int], namespace_of: NamespaceOf, limit: int, salt: str = "") -> list[int]:
        """Cached pages of the longest known prefix of at most `limit` tokens. Takes no reference."""
        return [node.page for node in self._walk(tokens, namespace_of, limit, salt)]

    def acquire(self, pages: Sequence[int]) -> None:
        """Take a reference on each of these matched pages: they cannot be evicted until it is released."""
        for page in pages:
            node = self._by_page[page]
            if node.refs == 0:  # its entry in the heap is stale from now on
                self.pool.move(page, PageKind.KV)
            node.refs += 1
            node.uses += 1

    def insert(
        self,
        tokens: Sequence[int],
        pages: list[int],
        namespace_of: NamespaceOf,
        start: int,
        fence: int,
        salt: str = "",
    ) -> None:
        """Give keys to the full pages from page index `start` on, which one request holds and has computed.

        If a page of the same key is cached already, because another request was faster, that page replaces ours in
        `pages`, with a reference, and ours is freed.
        """
        if not self.enabled:
            return
        full = len(tokens) // self.page_size
        parent = self._by_page[pages[start - 1]] if start > 0 else None
        for i in range(start, full):
            key = self._key(parent, tokens, i, namespace_of, salt)
            node = self._nodes.get(key)
            if node is None:  # the page moves from the request to the cache; the request keeps one reference
                node = self._add(key, pages[i], parent)
            else:
                self.pool.free_pages([pages[i]], fence)
                self.acquire([node.page])
                pages[i] = node.page
            parent = node

    def release(self, pages: Sequence[int], fence: int) -> None:
        """Return a request's pages: those with a key lose a reference and become idle at zero, private ones are
        freed. Steps up to `fence` may still use them."""
        private = []
        # children first, so that a parent never has fewer references than its child
        for page in reversed(pages):
            node = self._by_page.get(page)
            if node is None:
                private.append(page)
                continue
            node.refs -= 1
            if node.refs == 0 and node.orphan:
                self._free(node, fence)
            elif node.refs == 0:
                self.pool.move(page, PageKind.PREFIX)
                self._offer(node)
        self.pool.free_pages(private, fence)

    # ------------------------------------------------------------------ eviction (Reclaimable)

    def idle_pages(self) -> int:
        """See `Reclaimable`."""
        return self.pool.count(PageKind.PREFIX)

    def peek_victim(self) -> float | None:
        """See `Reclaimable`."""
        while self._heap:
            score, _, node = self._heap[0]
            if self._evictable(node) and node.score == score:
                return score
            heapq.heappop(self._heap)
        return None

    def evict(self, fence: int) -> int:
        """See `Reclaimable`. Frees one page."""
        assert self.peek_victim() is not None
        _, _, node = heapq.heappop(self._heap)
        self._remove(node, fence)
        return 1

    def has_pages(self, namespace: int) -> bool:
        """Whether any page, idle or in use, has a key in this namespace."""
        return namespace in self._by_namespace

    def drop_namespace(self, namespace: int, fence: int) -> None:
        """Free every page of a namespace that no request will ask for again: the idle ones now, the others, which
        belong to requests that have gone on to another namespace, when they are released."""
        nodes = list(self._by_namespace.get(namespace, {}).values())
        self._remove_all([node for node in nodes if node.refs == 0], fence)
        for node in nodes:
            if node.refs:
                self._forget(node)
                node.orphan = True

    def demote_namespace(self, namespace: int) -> None:
        """Halve the score of a namespace's idle leaves: its adapter has left the device."""
        for node in self._by_namespace.get(namespace, {}).values():
            if self._evictable(node):
                node.score = self.clock.now + (node.score - self.clock.now) / 2
                heapq.heappush(self._heap, (node.score, node.id, node))

    def flush(self, fence: int) -> None:
        """Free every idle page."""
        self._remove_all([n for n in self._nodes.values() if n.refs == 0], fence)

    def check(self) -> None:
        """Raise AssertionError if the tree is inconsistent. O(nodes), so for tests and for an idle engine."""
        idle = sum(1 for n in self._nodes.values() if n.refs == 0)
        assert idle == self.idle_pages(), f"{idle} idle nodes, {self.idle_pages()} idle pages"
        children: dict[int, int] = {}
        for page, node in self._by_page.items():
            assert node.page == page
            assert (self._nodes.get(node.key) is node) is not node.orphan
            assert node.refs or not node.orphan, "an orphan that nobody holds"
            assert self.pool.kind(node.page) is (PageKind.KV if node.refs else PageKind.PREFIX)
            if node.parent is not None:
                assert self._by_page[node.parent.page] is node.parent, "a child outlived its parent"
                assert node.parent.refs >= node.refs, "a child is held more often than its parent"
                children[node.parent.id] = children.get(node.parent.id, 0) + 1
        assert all(children.get(n.id, 0) == n.children for n in self._by_page.values())
        assert len(self._nodes) == sum(not n.orphan for n in self._by_page.values())

    # ------------------------------------------------------------------ inside

    def _key(
        self, parent: Node | None, tokens: Sequence[int], index: int, namespace_of: NamespaceOf, salt: str
    ) -> PageKey:
        first = index * self.page_size
        ids = tuple(tokens[first : first + self.page_size])
        return (parent.id if parent else ROOT, ids, namespace_of(index), salt)

    def _walk(self, tokens: Sequence[int], namespace_of: NamespaceOf, limit: int, salt: str) -> list[Node]:
        path: list[Node] = []
        parent = None
        for i in range(min(limit, len(tokens)) // self.page_size):
            parent = self._nodes.get(self._key(parent, tokens, i, namespace_of, salt))
            if parent is None:
                break
            path.append(parent)
        return path

    def _add(self, key: PageKey, page: int, parent: Node | None) -> Node:
        node = Node(self._next_id, key, page, parent, refs=1)
        self._next_id += 1
        self._nodes[key] = self._by_page[page] = node
        self._by_namespace.setdefault(key[2], {})[node.id] = node
        if parent is not None:
            parent.children += 1
        return node

    def _evictable(self, node: Node) -> bool:
        return node.refs == 0 and node.children == 0 and self._nodes.get(node.key) is node

    def _offer(self, node: Node) -> None:
        """Score a node that has become idle; only a leaf is a candidate, its parent follows once it is gone."""
        node.score = self.clock.score(node.uses, PREFIX_PAGE_COST)
        if node.children == 0:
            heapq.heappush(self._heap, (node.score, node.id, node))

    def _remove(self, node: Node, fence: int) -> None:
        self._forget(node)
        self._free(node, fence)

    def _forget(self, node: Node) -> None:
        """Nobody finds it any more."""
        del self._nodes[node.key]
        namespace = self._by_namespace[node.key[2]]
        del namespace[node.id]
        if not namespace:
            del self._by_namespace[node.key[2]]

    def _free(self, node: Node, fence: int) -> None:
        assert node.refs == 0 and node.children == 0
        del self._by_page[node.page]
        self.pool.free_pages([node.page], fence)
        parent = node.parent
        if parent is not None:
            parent.children -= 1
            if parent.children == 0 and parent.refs == 0:  # an idle leaf now, with the score of its last use
                heapq.heappush(self._heap, (parent.score, parent.id, parent))

    def _remove_all(self, nodes: list[Node], fence: int) -> None:
        for node in sorted(nodes, key=lambda n: n.id, reverse=True):  # children have higher ids than parents
            self._remove(node, fence)
