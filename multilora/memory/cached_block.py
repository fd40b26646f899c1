"""One block of the prefix cache, as data, and how a sequence lists its pages. Changed by `prefix_cache.py` alone.

A sequence lists the pages of its blocks one after the other, those of a block in the order of columns
(`kv_layout.py`); `HOLE`: it has none there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from multilora.memory.kv_group import KVGroup

PageKey = tuple[int, tuple[int, ...], int, str]  # parent node id, tokens, namespace, salt

HOLE = -1
"""Stands for a page that the sequence does not need, and does not hold."""


@dataclass(eq=False, slots=True)
class GroupPages:
    """What a KV group keeps of a block. pages: empty: they have been evicted."""

    pages: list[int]
    refs: int = 0
    uses: int = 1
    score: float = 0.0


@dataclass(eq=False)
class Node:
    """One cached block, with a part for each group. `id` is never reused, so keys of children stay exact after
    eviction."""

    id: int
    key: PageKey
    parent: "Node | None"
    parts: list[GroupPages] = field(default_factory=list)
    children: int = 0
    orphan: bool = False  # its namespace was dropped: nobody finds it, and it is freed when it is released

    def path(self) -> "Iterator[Node]":
        """The node and all before it, the last first."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    @property
    def held(self) -> bool:
        """Whether any request holds a part of it."""
        return any(part.refs for part in self.parts)

    @property
    def complete(self) -> bool:
        """Whether no part of it has been evicted."""
        return all(part.pages for part in self.parts)


def held_parts(pages: Sequence[int], block: int, groups: Sequence[KVGroup], columns: int) -> list[list[int]]:
    """The pages that a sequence has for each group in this block; none where there are holes."""
    held, at = [], block * columns
    for group in groups:
        own = list(pages[at : at + group.columns])
        held.append(own if own[0] != HOLE else [])
        at += group.columns
    return held


def usable_blocks(path: Sequence[Node], groups: Sequence[KVGroup], page_size: int) -> int:
    """How many blocks of the path a request can begin with: the windows before its first token are complete."""
    windows = [(g, group) for g, group in enumerate(groups) if group.window is not None]
    if not windows:
        return len(path)
    usable, complete_from = 0, [0] * len(groups)
    for n, node in enumerate(path, start=1):
        for g, _ in windows:
            if not node.parts[g].pages:
                complete_from[g] = n
        position = n * page_size
        if all(complete_from[g] <= group.first_block(position, page_size) for g, group in windows):
            usable = n
    return usable
