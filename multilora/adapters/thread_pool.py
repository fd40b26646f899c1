"""A few threads over one list of work, for what releases the GIL: reading, casting, copying.

Owns its threads, nothing else. Called by `loading/`, `peft/` and `device/`.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")

Slab = tuple[int, int, int]
"""Part of a file and where it goes: first byte in the file, first byte in memory, bytes."""

ReadCached = Callable[[int, list[Slab], torch.Tensor], list[Slab]]
"""Read from a file (its descriptor) into uint8 memory what the system has at hand; returns what is left to read."""


def spare_cores(at_most: int) -> int:
    """How many threads may work beside the step loop and the front, of the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(at_most, cores - 2))


def private_memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8)


def read_nothing(_fd: int, slabs: list[Slab], _memory: torch.Tensor) -> list[Slab]:
    """A `ReadCached` that reads nothing: everything is left to the caller."""
    return slabs


class ReaderPool:
    """`threads` 1: no thread is started, the caller works alone. memory: where the crew's results are to lie.
    read_cached: asked before a file is read by the threads."""

    def __init__(
        self,
        threads: int = 1,
        memory: Callable[[int], torch.Tensor] = private_memory,
        read_cached: ReadCached = read_nothing,
    ):
        self.memory = memory
        self.read_cached = read_cached
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "crew") if threads > 1 else None

    def each(self, work: Callable[[T], None], items: Sequence[T]) -> None:
        """`work(item)` for every item, in any order; the caller works too. Raises an error when all have stopped."""
        left = iter(items)

        def take() -> None:
            for item in left:
                work(item)

        helpers = min(self._threads, len(items)) - 1
        futures = [self._pool.submit(take) for _ in range(helpers)] if self._pool else []
        try:
            take()
        finally:
            wait([future for future in futures if not future.cancel()])
        for future in futures:
            if not future.cancelled():
                future.result()

    @property
    def alone(self) -> bool:
        return self._pool is None

    def start(self, work: Callable[[], T]) -> Future[T]:
        """`work()` on another thread; without one, at once."""
        if self._pool is not None:
            return self._pool.submit(work)
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as e:  # noqa: BLE001 (the future carries it to the caller, as a thread's would)
            future.set_exception(e)
        return future


ALONE = ReaderPool()
