"""Prefix cache in whole blocks: which pages hold the KV of which tokens after which prefix.

A block's key is (parent block's node, token ids, namespace, salt), compared exactly, so two different prefixes can
never be taken for each other. The namespace is a property of the block: the base model and every adapter *version*
have their own. The salt is the client's: requests share pages only with requests of the same salt. The cache knows
what a namespace equals, not what it means. Called by `page_table.py` and `engine/build.py`.

    request A   [p0]──[p1]──[p2]──(p7: partial, private to A)
    request B   [p0]──[p1]──[p5]──(p9)
                  refs 2     refs 1

What a KV group (`kv_group.py`) has of a block is counted by itself; with no reference left its pages are idle and
may be evicted: those of a group that sees everything leaves first, those of a window anywhere. What a request has
left behind its window is idle, too. A prefix is usable up to where the windows before its end are complete:

    sees all    [p0]──[p1]──[p2]──[p3]──[p4]
    window      [w0]──[w1]── ·  ── ·  ──[w4]       two blocks, or five if a window is no longer than a block
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

from multilora.memory.cached_block import HOLE, GroupPages, Node, PageKey, held_parts, usable_blocks
from multilora.memory.kv_group import KVGroup
from multilora.memory.page_pool import PageKind, PagePool
from multilora.memory.reclaim import LEFT_BEHIND_COST, PREFIX_PAGE_COST, GdsfClock

NamespaceOf = Callable[[int], int]  # block index in the sequence → namespace
ROOT = 0


class PrefixCache:
    """Owns the KV pages that have a key. Private (partial) blocks belong to their request."""

    def __init__(
        self,
        pool: PagePool,
        clock: GdsfClock,
        page_size: int,
        enabled: bool = True,
        groups: Sequence[KVGroup] = (KVGroup(),),
    ):
        """groups: those that see furthest first."""
        self.pool = pool
        self.clock = clock
        self.page_size = page_size
        self.enabled = enabled
        self.groups = groups
        self.columns = sum(group.columns for group in groups)
        self._nodes: dict[PageKey, Node] = {}
        self._by_page: dict[int, Node] = {}
        self._by_namespace: dict[int, dict[int, Node]] = {}  # namespace → node id → node
        # idle parts by score, as (score, node id, group, node); stale entries are skipped when popped
        self._heap: list[tuple[float, int, int, Node]] = []
        self._next_id = ROOT + 1

    # ------------------------------------------------------------------ for requests

    def match(self, tokens: Sequence[int], namespace_of: NamespaceOf, limit: int, salt: str = "") -> list[int]:
        """Cached pages of the longest usable prefix of at most `limit` tokens. Takes no reference."""
        path = self._walk(tokens, namespace_of, limit, salt)
        usable = usable_blocks(path, self.groups, self.page_size)
        first = [group.first_block(usable * self.page_size, self.page_size) for group in self.groups]
        pages: list[int] = []
        for i, node in enumerate(path[:usable]):
            for group, start, part in zip(self.groups, first, node.parts, strict=True):
                pages += part.pages if i >= start else [HOLE] * group.columns
        return pages

    def acquire(self, pages: Sequence[int]) -> None:
        """Take a reference on each of these matched pages: they cannot be evicted until it is released."""
        for node, held in self._parts_of(pages, 0, len(pages) // self.columns):
            for group, own in enumerate(held):
                if own:
                    assert node is not None, "a matched page has a key"
                    self._take(node.parts[group])

    def insert(
        self,
        tokens: Sequence[int],
        pages: list[int],
        namespace_of: NamespaceOf,
        start: int,
        fence: int,
        salt: str = "",
    ) -> None:
        """Give keys to the full blocks from block `start` on, which one request holds and has computed.

        If a block of the same key is cached already, because another request was faster, its pages replace ours in
        `pages`, with references, and ours are freed.
        """
        if not self.enabled:
            return
        full = len(tokens) // self.page_size
        parent = self._node_at(pages, start - 1) if start > 0 else None
        assert parent is not None or start == 0, "the last block with a key is held"
        for i, (_, own) in enumerate(self._parts_of(pages, start, full), start):
            key = self._key(parent, tokens, i, namespace_of, salt)
            node = self._nodes.get(key)
            if node is None:  # the pages move from the request to the cache; the request keeps a reference on each
                node = self._add(key, own, parent)
            else:
                pages[i * self.columns : (i + 1) * self.columns] = self._share(node, own, fence)
            parent = node

    def release(self, pages: Sequence[int], fence: int) -> None:
        """Return a request's pages: those with a key lose a reference and become idle at zero, private ones are
        freed. Steps up to `fence` may still use them."""
        private: list[int] = []
        # children first, so that a parent never has fewer references than its child
        for node, held in reversed(list(self._parts_of(pages, 0, len(pages) // self.columns))):
            if node is None:
                private += [page for own in held for page in own]
            else:
                self._release(node, [g for g, own in enumerate(held) if own], fence, PREFIX_PAGE_COST)
        self.pool.free_pages(private, fence)

    def leave(self, pages: list[int], group: int, blocks: range, fence: int) -> None:
        """Return what a request that goes on holds of these blocks for a group with a window, and put holes in their
        place."""
        first = sum(g.columns for g in self.groups[:group])
        for i in blocks:
            at = slice(i * self.columns + first, i * self.columns + first + self.groups[group].columns)
            own = pages[at]
            if own[0] == HOLE:
                continue
            node = self._by_page.get(own[0])
            if node is None:
                self.pool.free_pages(own, fence)
            else:
                self._release(node, [group], fence, LEFT_BEHIND_COST)
            pages[at] = [HOLE] * len(own)

    # ------------------------------------------------------------------ eviction (Reclaimable)

    def idle_pages(self) -> int:
        """See `Reclaimable`."""
        return self.pool.count(PageKind.PREFIX)

    def peek_victim(self) -> float | None:
        """See `Reclaimable`."""
        while self._heap:
            score, _, group, node = self._heap[0]
            if self._evictable(node, group) and node.parts[group].score == score:
                return score
            heapq.heappop(self._heap)
        return None

    def evict(self, fence: int) -> int:
        """See `Reclaimable`. Frees the pages of one block, or those that it has for one window."""
        assert self.peek_victim() is not None
        _, _, group, node = heapq.heappop(self._heap)
        free = self.pool.free
        if node.children or node.held:
            self._empty(node.parts[group], fence)
        else:
            self._remove(node, fence)
        return self.pool.free - free

    def has_pages(self, namespace: int) -> bool:
        """Whether any block, idle or in use, has a key in this namespace."""
        return namespace in self._by_namespace

    def drop_namespace(self, namespace: int, fence: int) -> None:
        """Free every page of a namespace that no request will ask for again: the idle ones now, the others, which
        belong to requests that have gone on to another namespace, when they are released."""
        nodes = list(self._by_namespace.get(namespace, {}).values())
        for node in self._remove_all(nodes, fence):
            self._forget(node)
            node.orphan = True
            for part in node.parts:
                if part.refs == 0:
                    self._empty(part, fence)

    def demote_namespace(self, namespace: int) -> None:
        """Halve the score of what is idle in a namespace: its adapter has left the device."""
        for node in self._by_namespace.get(namespace, {}).values():
            for group, part in enumerate(node.parts):
                if self._evictable(node, group):
                    part.score = self.clock.now + (part.score - self.clock.now) / 2
                    heapq.heappush(self._heap, (part.score, node.id, group, node))

    def flush(self, fence: int) -> None:
        """Free every idle page."""
        self._remove_all(list(self._nodes.values()), fence)

    def check(self) -> None:
        """Raise AssertionError if the tree is inconsistent. O(nodes), so for tests and for an idle engine."""
        nodes = {node.id: node for known in (*self._by_page.values(), *self._nodes.values()) for node in known.path()}
        found = {page: node for node in nodes.values() for part in node.parts for page in part.pages}
        assert found == self._by_page, "pages and nodes do not match"
        idle = 0
        children: dict[int, int] = {}
        for node in nodes.values():
            assert (self._nodes.get(node.key) is node) is not node.orphan
            assert node.held or node.children or not node.orphan, "an orphan that nobody holds"
            for group, part in zip(self.groups, node.parts, strict=True):
                may_lack = node.orphan or group.window is not None
                assert len(part.pages) == group.columns or (may_lack and not part.pages)
                assert part.pages or not part.refs, "pages in use are gone"
                kind = PageKind.KV if part.refs else PageKind.PREFIX
                assert all(self.pool.kind(page) is kind for page in part.pages)
                idle += 0 if part.refs else len(part.pages)
            if node.parent is not None:
                assert nodes.get(node.parent.id) is node.parent, "a child outlived its parent"
                if self.groups[0].window is None:
                    assert node.parent.parts[0].refs >= node.parts[0].refs, "a child is held more often"
                children[node.parent.id] = children.get(node.parent.id, 0) + 1
        assert all(children.get(n.id, 0) == n.children for n in nodes.values())
        assert idle == self.idle_pages(), f"{idle} pages of idle parts, {self.idle_pages()} idle pages"

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

    def _parts_of(self, pages: Sequence[int], start: int, stop: int) -> Iterator[tuple[Node | None, list[list[int]]]]:
        """For each of these blocks of a sequence: its node, None: it is private; and see `held_parts`."""
        for block in range(start, stop):
            held = held_parts(pages, block, self.groups, self.columns)
            yield next((self._by_page.get(own[0]) for own in held if own), None), held

    def _node_at(self, pages: Sequence[int], block: int) -> Node | None:
        return next(node for node, _ in self._parts_of(pages, block, block + 1))

    def _add(self, key: PageKey, pages: Iterable[list[int]], parent: Node | None) -> Node:
        node = Node(self._next_id, key, parent, [GroupPages(own, refs=int(bool(own))) for own in pages])
        self._next_id += 1
        self._nodes[key] = node
        for part in node.parts:
            self._by_page.update(dict.fromkeys(part.pages, node))
        self._by_namespace.setdefault(key[2], {})[node.id] = node
        if parent is not None:
            parent.children += 1
        return node

    def _share(self, node: Node, pages: Iterable[list[int]], fence: int) -> list[int]:
        """Take references on the node for one that has computed the same block, in its own pages. Returns the pages
        that it has from now on."""
        found: list[int] = []
        for part, own in zip(node.parts, pages, strict=True):
            if part.pages:
                self.pool.free_pages(own, fence)
                self._take(part)
            else:  # evicted meanwhile
                assert own, "what has just been computed is held"
                part.pages, part.refs = own, 1
                self._by_page.update(dict.fromkeys(own, node))
            found += part.pages
        return found

    def _take(self, part: GroupPages) -> None:
        if part.refs == 0:  # its entry in the heap is stale from now on
            for page in part.pages:
                self.pool.move(page, PageKind.KV)
        part.refs += 1
        part.uses += 1

    def _release(self, node: Node, groups: Iterable[int], fence: int, cost: float) -> None:
        """One request holds these parts of the node no more. cost: of bringing one of their pages back."""
        for group in groups:
            part = node.parts[group]
            part.refs -= 1
            if part.refs == 0 and node.orphan:
                self._empty(part, fence)
            elif part.refs == 0:
                for page in part.pages:
                    self.pool.move(page, PageKind.PREFIX)
                part.score = self.clock.score(part.uses, cost)
                if self.groups[group].window is not None:
                    self._offer(node, group)
        self._clear(node, fence)

    def _evictable(self, node: Node, group: int) -> bool:
        part = node.parts[group]
        if part.refs or not part.pages or self._nodes.get(node.key) is not node:
            return False
        return self.groups[group].window is not None or node.children == 0

    def _offer(self, node: Node, group: int) -> None:
        """A candidate from now on. Where a group sees everything only leaves are; their parents follow them."""
        if self._evictable(node, group):
            heapq.heappush(self._heap, (node.parts[group].score, node.id, group, node))

    def _empty(self, part: GroupPages, fence: int) -> None:
        """Free its pages, which nobody holds."""
        assert part.refs == 0
        for page in part.pages:
            del self._by_page[page]
        self.pool.free_pages(part.pages, fence)
        part.pages = []

    def _remove(self, node: Node, fence: int) -> None:
        """Remove an idle leaf, and those before it that are of no use then."""
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
        assert not node.held and not node.children
        for part in node.parts:
            self._empty(part, fence)
        parent = node.parent
        if parent is not None:
            parent.children -= 1
            self._clear(parent, fence)

    def _clear(self, node: Node, fence: int) -> None:
        """The node may have become an idle leaf: a candidate, or of no use, if nobody finds it or could go on."""
        if node.children or node.held:
            return
        if node.orphan:
            self._free(node, fence)
        elif not node.complete:
            self._remove(node, fence)
        else:
            for group, kind in enumerate(self.groups):
                if kind.window is None:
                    self._offer(node, group)

    def _remove_all(self, nodes: Iterable[Node], fence: int) -> list[Node]:
        """Free what is idle of these nodes. Returns those that are still there: in use, or before others that are."""
        left = []
        for node in sorted(nodes, key=lambda n: n.id, reverse=True):  # children have higher ids than parents
            if self._nodes.get(node.key) is not node:
                continue  # it has gone with its last child
            if not node.children and not node.held:
                self._remove(node, fence)
                continue
            left.append(node)
            for group, part in zip(self.groups, node.parts, strict=True):
                if part.refs == 0 and group.window is not None:
                    self._empty(part, fence)
        return left
