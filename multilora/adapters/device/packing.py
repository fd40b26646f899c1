"""Adapters that a GPU packs: the bytes of their files go to the device part by part, and from there to the pages.

It runs on the copying thread, on its stream, where each part waits for the one before. Called by `ring_copier.py`.
"""

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from multilora.adapters.pack_table import HALF, PART_BYTES, TABLE_WORDS, PackTable
from multilora.transfer import upload

KEPT_TABLES = 32


def compile_packing(arena: torch.Tensor, dtype: torch.dtype) -> None:
    """Compile what `Packing` launches, now: later it would hold up running steps, and nothing may be compiled while a
    graph is captured."""
    from multilora.adapters.device.triton_pack import pack

    nothing = torch.zeros(1, TABLE_WORDS, dtype=torch.int64, device=arena.device)
    for stored in map(partial(getattr, torch), HALF if dtype.itemsize == 2 else ()):
        pack(torch.zeros(16, dtype=stored, device=arena.device), arena.view(dtype), nothing, nothing[0], 1)


class RingSlot:
    """Pinned memory for some pages, and the moment from which on it may be filled again."""

    def __init__(self, pages: int, page_bytes: int):
        self.memory = torch.empty(pages, page_bytes, dtype=torch.uint8, pin_memory=True)
        self.free = torch.cuda.Event()


class Packing:
    """Packs into the arena, on `stream`. The memory for a part is taken with the first adapter."""

    def __init__(self, arena: torch.Tensor, stream: torch.cuda.Stream):
        self._arena = arena
        self._stream = stream
        self._part: torch.Tensor | None = None
        self._tables: OrderedDict[bytes, tuple[torch.Tensor, list[int]]] = OrderedDict()

    def run(self, buffer: torch.Tensor, pages: list[int], table: PackTable, slots: Iterator[RingSlot]) -> None:
        """Put everything on the stream. buffer: the bytes of the file's tensors, in host memory; pages: where the
        adapter's pages lie; slots: for memory that is not pinned."""
        from multilora.adapters.device.triton_pack import pack

        if self._part is None:
            self._part = torch.empty(PART_BYTES, dtype=torch.uint8, device=self._arena.device)
        rows, widest = self._on_device(table)
        places, flat, pinned = upload(pages, self._arena.device), buffer.view(-1), buffer.is_pinned()
        raw, arena = self._part.view(getattr(torch, table.stored)), self._arena.view(getattr(torch, table.dtype))
        for (first, nbytes, row, count), columns in zip(table.parts, widest, strict=True):
            source = flat[first : first + nbytes]
            slot = None if pinned else next(slots)
            if slot is not None:
                slot.free.synchronize()
                source = slot.memory.view(-1)[:nbytes].copy_(source)
            self._part[:nbytes].copy_(source, non_blocking=True)
            if slot is not None:
                slot.free.record(self._stream)
            pack(raw, arena, rows[row : row + count], places, columns)

    def _on_device(self, table: PackTable) -> tuple[torch.Tensor, list[int]]:
        """The rows of a table, and the most columns of each part's."""
        if table.rows not in self._tables:
            rows = np.frombuffer(table.rows, np.int64).reshape(-1, TABLE_WORDS)
            widest = [int(rows[row : row + count, 4].max(initial=0)) for _, _, row, count in table.parts]
            self._tables[table.rows] = upload(torch.from_numpy(rows.copy()), self._arena.device), widest
            if len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(table.rows)
        return self._tables[table.rows]
