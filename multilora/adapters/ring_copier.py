"""Copies of adapters to a GPU while steps run: host memory → a small ring of pinned memory → pages, on a side stream.

Pinned memory stays bounded however many adapters are loaded. A few threads feed the ring, as one core copies slower
than the link; none of it holds the GIL. The pages were free for every stream when they were taken (see the fence in
memory/page_pool.py), so the side stream waits for nothing; whoever reads them first asks `done`.
"""

import itertools
import queue
import threading

import numpy as np
import torch

from multilora.adapters.copier import runs
from multilora.adapters.crew import spare_cores
from multilora.adapters.mapping import populate

THREADS = 4
SLOTS = 2  # of each thread: one is filled while the other is copied
SLOT_BYTES = 8 << 20


class RingCopy:
    """One copy of buffer[i] to page pages[i]. buffer: uint8 [pages, page_bytes] in host memory."""

    def __init__(self, buffer: torch.Tensor, pages: list[int], parts: int):
        self.buffer = buffer
        self.pages = pages
        self._parts = parts  # not yet on the stream
        self._lock = threading.Lock()
        self._finished: torch.cuda.Event | None = None
        self._error: Exception | None = None

    def done(self) -> bool:
        """Raises what went wrong, if anything did."""
        if self._error is not None:
            raise self._error
        return self._finished is not None and self._finished.query()

    def part_queued(self, stream: torch.cuda.Stream) -> None:
        """Another part of it is on the stream. After the last, an event marks the end."""
        with self._lock:
            self._parts -= 1
            last = self._parts == 0
        if last:
            finished = torch.cuda.Event()
            finished.record(stream)
            self._finished = finished

    def fail(self, error: Exception) -> None:
        self._error = error


class _Slot:
    def __init__(self, pages: int, page_bytes: int):
        self.memory = torch.empty(pages, page_bytes, dtype=torch.uint8, pin_memory=True)
        self.numbers: np.ndarray = self.memory.numpy()
        self.free = torch.cuda.Event()


class RingCopier:
    """Starts copies; daemon threads move them, in order as far as they can."""

    def __init__(
        self,
        arena: torch.Tensor,
        threads: int | None = None,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ):
        page_bytes = arena.shape[1]
        self._arena = arena
        self._slot_pages = max(1, slot_bytes // page_bytes)
        self._stream = torch.cuda.Stream(arena.device)
        self._parts: queue.SimpleQueue[tuple[RingCopy, int]] = queue.SimpleQueue()
        for _ in range(threads or spare_cores(THREADS)):
            ring = [_Slot(self._slot_pages, page_bytes) for _ in range(slots)]
            threading.Thread(target=self._work, args=(ring,), name="adapter-copies", daemon=True).start()

    def start(self, buffer: torch.Tensor, pages: list[int]) -> RingCopy:
        firsts = range(0, len(pages), self._slot_pages)
        job = RingCopy(buffer, pages, len(firsts))
        for first in firsts:
            self._parts.put((job, first))
        return job

    def _work(self, ring: list[_Slot]) -> None:
        torch.cuda.set_device(self._arena.device)
        for slot in itertools.cycle(ring):
            job, first = self._parts.get()
            try:
                self._copy(job, first, slot)
            except Exception as e:
                job.fail(e)

    @torch.inference_mode()
    def _copy(self, job: RingCopy, first: int, slot: _Slot) -> None:
        pages = job.pages[first : first + self._slot_pages]
        slot.free.synchronize()
        part = job.buffer[first : first + len(pages)]
        populate(part)
        np.copyto(slot.numbers[: len(pages)], part.numpy())
        with torch.cuda.stream(self._stream):
            for at, page, count in runs(pages):
                self._arena[page : page + count].copy_(slot.memory[at : at + count], non_blocking=True)
            slot.free.record(self._stream)
        job.part_queued(self._stream)
