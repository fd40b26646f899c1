"""Copies of adapters to a GPU while steps run: host memory → a small ring of pinned memory → pages, on a side stream.

Pinned memory stays bounded however many adapters are loaded; a buffer in pinned memory needs no ring. One thread
feeds it, with OpenMP's help, as one core copies slower than the link; none of it holds the GIL. (Several threads of
Python wait for each other's GIL at every call: 25 GB/s instead of 45.) The pages were free for every stream when they
were taken (see the fence in memory/page_pool.py), so the side stream waits for nothing; readers first ask `done`.
"""

import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator

import torch

from multilora.adapters.device.copier import runs
from multilora.adapters.device.packing import Packing, RingSlot
from multilora.adapters.host.mapping import prefault_read
from multilora.adapters.pack_table import PackTable
from multilora.adapters.thread_pool import spare_cores

CORES = 14
SLOTS = 3  # one is filled while another is copied
SLOT_BYTES = 32 << 20
CLOSE_SECONDS = 10  # after which a device that hangs is not waited for


class RingCopy:
    """One copy of buffer[i] to page pages[i]. buffer: uint8 [pages, page_bytes] in host memory; table: see
    `Copier`."""

    def __init__(self, buffer: torch.Tensor, pages: list[int], table: PackTable | None = None):
        self.buffer = buffer
        self.pages = pages
        self.table = table
        self._finished: torch.cuda.Event | None = None
        self._error: Exception | None = None

    def done(self) -> bool:
        """Whether the pages can be read. Raises what went wrong with the copy, if anything did."""
        if self._error is not None:
            raise self._error
        return self._finished is not None and self._finished.query()

    def queued(self, stream: torch.cuda.Stream) -> None:
        """All of the copy is on the stream."""
        finished = torch.cuda.Event()
        finished.record(stream)
        self._finished = finished

    def fail(self, error: Exception) -> None:
        self._error = error


class RingCopier:
    """Starts copies; a daemon thread moves them, in order, until `close`."""

    def __init__(self, arena: torch.Tensor, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES):
        self._arena = arena
        self._slot_pages = max(1, slot_bytes // arena.shape[1])
        self._stream = torch.cuda.Stream(arena.device)
        self._packing = Packing(arena, self._stream)
        self._jobs: queue.SimpleQueue[RingCopy | None] = queue.SimpleQueue()
        ring = [RingSlot(self._slot_pages, arena.shape[1]) for _ in range(slots)]
        self._closing = False
        self._thread = threading.Thread(target=self._work, args=(ring,), name="adapter-copies", daemon=True)
        self._thread.start()

    def start_copy(self, buffer: torch.Tensor, pages: list[int], table: PackTable | None = None) -> RingCopy:
        job = RingCopy(buffer, pages, table)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Wait for the copies that have begun and drop the others: nothing writes to the arena afterwards, as its
        memory may be freed."""
        self._closing = True
        self._jobs.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _work(self, ring: list[RingSlot]) -> None:
        torch.cuda.set_device(self._arena.device)
        torch.set_num_threads(spare_cores(CORES))  # OpenMP's, of this thread
        slots = itertools.cycle(ring)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            while (job := self._jobs.get()) is not None and not self._closing:
                try:
                    if job.table is not None:
                        self._packing.run(job.buffer, job.pages, job.table, slots)
                    elif job.buffer.is_pinned():
                        self._queue(job.buffer, job.pages)
                    else:
                        self._through_ring(job, slots)
                    job.queued(self._stream)
                except Exception as e:  # `done` raises it  # noqa: BLE001 - the step loop raises it
                    job.fail(e)
                del job
            with contextlib.suppress(RuntimeError):  # a broken device writes nothing
                self._stream.synchronize()

    def _through_ring(self, job: RingCopy, slots: Iterator[RingSlot]) -> None:
        for first in range(0, len(job.pages), self._slot_pages):
            pages, slot = job.pages[first : first + self._slot_pages], next(slots)
            part = job.buffer[first : first + len(pages)]
            prefault_read(part)
            slot.free.synchronize()
            slot.memory[: len(pages)].copy_(part)
            self._queue(slot.memory, pages)
            slot.free.record(self._stream)

    def _queue(self, pinned: torch.Tensor, pages: list[int]) -> None:
        for at, page, count in runs(pages):
            self._arena[page : page + count].copy_(pinned[at : at + count], non_blocking=True)
