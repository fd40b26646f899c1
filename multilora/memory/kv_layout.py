"""How the KV cache of one model lies in the pages of the arena.

A page holds `page_size` tokens of one KV group, all layers of this rank, laid out
`[layer, k|v, page_size, kv_heads, head_dim]`. This file is the only code that knows the offsets;
everyone else asks for strided per-layer views.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVLayout:
    """Shape of one page. One KV group: every layer has the same heads."""

    num_layers: int
    page_size: int  # tokens
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        return self.num_layers * 2 * self.page_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        return self.page_bytes // self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def views(self, arena: torch.Tensor) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Per-layer (k, v) views of the arena, each `[num_pages, page_size, kv_heads, head_dim]`, strided, no copy.

        arena: uint8 [num_pages, page_bytes], contiguous.
        """
        if arena.dtype != torch.uint8 or arena.dim() != 2 or arena.shape[1] != self.page_bytes:
            raise ValueError(
                f"arena must be uint8 [num_pages, {self.page_bytes}], is {arena.dtype} {tuple(arena.shape)}"
            )
        shape = (arena.shape[0], self.num_layers, 2, self.page_size, self.num_kv_heads, self.head_dim)
        pages = arena.view(self.dtype).view(shape)
        return [(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(self.num_layers)]
