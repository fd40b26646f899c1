"""Layers that keep the KV of the same tokens, as the books of pages know them. `kv_layout.py` says how it lies; this
file imports no torch, as what plans steps does not.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class KVGroup:
    """Layers whose tokens see equally far. window: so many tokens, the own one included; None: all before it.
    columns: pages of a block."""

    window: int | None = None
    columns: int = 1
    layers: tuple[int, ...] = ()

    def first_block(self, position: int, page_size: int) -> int:
        """The first block that tokens from `position` on see."""
        return 0 if self.window is None else max(0, position - self.window + 1) // page_size


def most_pages(groups: Iterable[KVGroup], page_size: int, tokens: int, on_their_way: int) -> int:
    """See `KVLayout.most_pages`."""
    total, blocks = 0, -(-tokens // page_size)
    for group in groups:
        held = blocks
        if group.window is not None:
            # the last one counts twice: a window need not begin where a block does, and a block that ends is kept
            held = min(blocks, -(-(group.window + on_their_way) // page_size) + 1)
        total += held * group.columns
    return total
