"""Copies of packed adapters from host memory into pages of the arena."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from multilora.adapters.pack_table import PackTable


class Copy(Protocol):
    """One copy under way."""

    def done(self) -> bool: ...


class Copier(Protocol):
    def start_copy(self, buffer: torch.Tensor, pages: list[int], table: PackTable | None = None) -> Copy:
        """Begin to copy buffer[i] (uint8 [page_bytes]) to arena page pages[i]; with a table, to pack it into them.
        The buffer must live until done."""
        ...

    def close(self) -> None:
        """Start no more copies."""


@dataclass(frozen=True)
class CopyInFlight:
    """A copy that was started and not yet seen to be done."""

    copy: Copy
    buffer: torch.Tensor  # what it reads: it must live, though the host tier may have evicted the adapter
    started_at: float  # seconds

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()


class _Finished:
    def done(self) -> bool:
        return True


class DirectCopier:
    """Copies at once, on the calling thread and, on a GPU, the current stream: in order with the steps.

    For CPU, where both ends are the same memory, and for a GPU when loading is not to overlap with steps.
    """

    def __init__(self, arena: torch.Tensor):
        self._arena = arena

    @torch.inference_mode()
    def start_copy(self, buffer: torch.Tensor, pages: list[int], table: PackTable | None = None) -> Copy:
        assert table is None, "nobody asks for it where this is the copier"
        for at, page, count in runs(pages):
            self._arena[page : page + count].copy_(buffer[at : at + count])
        return _Finished()

    def close(self) -> None: ...


def runs(pages: list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive pages: (index, page, how many)."""
    at = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield at, pages[at], i - at
            at = i
