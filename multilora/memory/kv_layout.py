"""How the KV cache of one model lies in the pages of the arena.

A *block* is `page_size` tokens of one text. Layers that see equally far are a *group*, because they keep the same
tokens: sliding-window layers only those of their window. All pages are of one size, the KV of `layers_per_page`
layers for the tokens of a block; a group of more layers than that takes several, its *columns*:

    block of Gemma 3 (26 layers, every 6th sees everything)    columns   0 | 1  2  3  4  5  6
                                                              layers    4 | 22, the last page partly filled
    group                                                            kept | of the last 512 tokens only

A page is laid out `[layer, k|v, page_size, kv_heads, head_dim]`. This file is the only code that knows the offsets;
everyone else asks for strided per-layer views.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from multilora.memory.kv_group import KVGroup, most_pages

MAX_COLUMNS = 8
"""The most pages of a block: each costs bookkeeping in every step."""


@dataclass(frozen=True)
class KVLayout:
    """Shape of one page; every layer has the same heads. windows: by layer, see `KVGroup`; empty: none has one."""

    num_layers: int
    page_size: int  # tokens
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    windows: tuple[int | None, ...] = ()

    @cached_property
    def groups(self) -> tuple[KVGroup, ...]:
        """Those that see furthest first."""
        each = self.layers_per_page
        return tuple(KVGroup(window, -(-len(layers) // each), layers) for window, layers in self._by_window.items())

    @cached_property
    def layers_per_page(self) -> int:
        """As few columns as fill the pages of what is kept for ever, and nearly those of windows."""
        return min(range(1, self.num_layers + 1), key=self._cost)

    @cached_property
    def layer_columns(self) -> tuple[int, ...]:
        """The column of each layer."""
        return tuple([column for column, _ in self._places])

    @property
    def columns(self) -> int:
        """Pages of a block."""
        return sum(group.columns for group in self.groups)

    @property
    def page_bytes(self) -> int:
        return self.layers_per_page * 2 * self.page_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of a token that all layers keep."""
        return self.columns * self.page_bytes // self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages of this many tokens that all layers keep."""
        return -(-tokens // self.page_size) * self.columns

    def most_pages(self, tokens: int, on_their_way: int) -> int:
        """The most pages that a text of this many tokens holds at a time, if at most so many of them are being
        computed."""
        return most_pages(self.groups, self.page_size, tokens, on_their_way)

    def views(self, arena: torch.Tensor) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Per-layer (k, v) views of the arena, each `[num_pages, page_size, kv_heads, head_dim]`, strided, no copy.

        arena: uint8 [num_pages, page_bytes], contiguous. A layer's tokens lie in pages of its column.
        """
        if arena.dtype != torch.uint8 or arena.dim() != 2 or arena.shape[1] != self.page_bytes:
            raise ValueError(
                f"arena must be uint8 [num_pages, {self.page_bytes}], is {arena.dtype} {tuple(arena.shape)}"
            )
        shape = (arena.shape[0], self.layers_per_page, 2, self.page_size, self.num_kv_heads, self.head_dim)
        pages = arena.view(self.dtype).view(shape)
        return [(pages[:, index, 0], pages[:, index, 1]) for _, index in self._places]

    @cached_property
    def _by_window(self) -> dict[int | None, tuple[int, ...]]:
        windows = self.windows or (None,) * self.num_layers
        ordered = sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
        return {one: tuple(layer for layer, w in enumerate(windows) if w == one) for one in ordered}

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """By layer: its column, and its index in a page of that."""
        found = [(0, 0)] * self.num_layers
        first = 0
        for group in self.groups:
            for i, layer in enumerate(group.layers):
                found[layer] = first + i // self.layers_per_page, i % self.layers_per_page
            first += group.columns
        return found

    def _cost(self, each: int) -> tuple[bool, int, int, int]:
        """What speaks against pages of so many layers, the worst first."""
        columns = {window: -(-len(layers) // each) for window, layers in self._by_window.items()}
        empty = {window: columns[window] * each - len(layers) for window, layers in self._by_window.items()}
        total = sum(columns.values())
        return total > MAX_COLUMNS, empty.pop(None, 0), sum(empty.values()), total
