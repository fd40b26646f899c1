"""Copies of packed adapters from host memory into pages of the arena."""

from typing import Protocol

import torch


class Copy(Protocol):
    """One copy under way."""

    def done(self) -> bool: ...


class Copier(Protocol):
    def start(self, buffer: torch.Tensor, pages: list[int]) -> Copy:
        """Begin to copy buffer[i] (uint8 [page_bytes]) to arena page pages[i]. The buffer must live until done."""
        ...


class _Finished:
    def done(self) -> bool:
        return True


class DirectCopier:
    """Copies at once, on the calling thread: for CPU, where both ends are the same memory."""

    def __init__(self, arena: torch.Tensor):
        self._arena = arena

    def start(self, buffer: torch.Tensor, pages: list[int]) -> Copy:
        self._arena[pages] = buffer.to(self._arena.device)
        return _Finished()
