"""What the tables say that GPUs pack adapters by: written a second time, for tests."""

import numpy as np
import torch

from multilora.adapters.pack_table import TABLE_WORDS, PackTable


def rows_of(table: PackTable) -> list[list[int]]:
    """The words of each row."""
    return np.frombuffer(table.rows, np.int64).reshape(-1, TABLE_WORDS).tolist()


def apply(table: PackTable, file: torch.Tensor, pages: torch.Tensor) -> None:
    """Pack as the table says, by definition. file: its numbers; pages: uint8 [pages, page_bytes], in order."""
    rows, out = rows_of(table), pages.view(getattr(torch, table.dtype)).view(-1)
    for first, nbytes, row, count in table.parts:
        part = file[first // 2 : (first + nbytes) // 2]
        for source, step, column, height, width, at, scaling, padded in rows[row : row + count]:
            numbers = part.as_strided((height, width), (step, column), part.storage_offset() + source)
            scale = torch.tensor(scaling, dtype=torch.int32).view(torch.float32)
            target = out[at : at + padded * width].view(padded, width)
            target[:height] = (numbers.float() * scale).to(target.dtype)
            target[height:] = 0


def named(table: PackTable, pages: torch.Tensor) -> torch.Tensor:
    """Which numbers of the pages, flat and two bytes each, the table writes."""
    found = torch.zeros(pages.numel() // 2, dtype=torch.bool)
    for *_, width, at, _, padded in rows_of(table):
        found[at : at + padded * width] = True
    return found
