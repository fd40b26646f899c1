"""A few threads that share one list of work, for work that releases the GIL: reading, casting, copying.

It owns its threads and nothing else. Called by `loading/`, `peft/`, `sources/` and `device/`.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")

Slab = tuple[int, int, int]
"""A part of a file and its destination: first byte in the file, first byte in memory, number of bytes."""

ReadCached = Callable[[int, list[Slab], torch.Tensor], list[Slab]]
"""(descriptor, slabs, uint8 memory) → the slabs left to read, after reading what the page cache holds."""


def spare_cores(at_most: int) -> int:
    """How many of this process' cores are left beside the step loop and the front, between 1 and `at_most`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(at_most, cores - 2))


def private_memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] in this process' own memory, not initialised."""
    return torch.empty(nbytes, dtype=torch.uint8)


def read_nothing(_fd: int, slabs: list[Slab], _memory: torch.Tensor) -> list[Slab]:
    """A `ReadCached` that reads nothing: everything is left to the caller."""
    return slabs


class ReaderPool:
    """`threads` threads, the caller's included; with 1, none is started. memory: allocates what is read into;
    read_cached: called before the threads read a file."""

    def __init__(
        self,
        threads: int = 1,
        memory: Callable[[int], torch.Tensor] = private_memory,
        read_cached: ReadCached = read_nothing,
    ):
        self.memory = memory
        self.read_cached = read_cached
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "adapter-reading") if threads > 1 else None

    def each(self, work: Callable[[T], None], items: Sequence[T]) -> None:
        """Call `work(item)` for every item, in any order; the caller works too. If a call raises, that error is
        raised once all threads have stopped."""
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
        """Whether there is no thread but the caller's."""
        return self._pool is None

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Call `work()` on another thread; if there is none, at once."""
        if self._pool is not None:
            return self._pool.submit(work)
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as e:  # noqa: BLE001 (the future carries it to the caller, as a thread's would)
            future.set_exception(e)
        return future


ALONE = ReaderPool()
