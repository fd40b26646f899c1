"""Copies of adapters to a GPU while steps run: host memory → a small ring of pinned memory → pages, on a side stream.

Pinned memory stays bounded however many adapters are loaded. A thread feeds the ring: filling one slot overlaps with
copying another, and neither holds the GIL. The pages were free for every stream when they were taken (see the fence
in memory/page_pool.py), so the side stream waits for nothing; whoever reads them first asks `done`.
"""

import queue
import threading
from dataclasses import dataclass, field

import torch

SLOTS = 4
SLOT_BYTES = 16 << 20


@dataclass(eq=False)
class RingCopy:
    """One copy. `error`: why it failed, raised by `done`."""

    buffer: torch.Tensor  # uint8 [pages, page_bytes] in host memory
    pages: list[int]
    queued: threading.Event = field(default_factory=threading.Event)  # all of it is on the stream
    finished: torch.cuda.Event | None = None
    error: Exception | None = None

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.queued.is_set() and self.finished is not None and self.finished.query()


@dataclass
class _Slot:
    memory: torch.Tensor  # uint8 [slot pages, page_bytes], pinned
    free: torch.cuda.Event


class RingCopier:
    """Starts copies; a daemon thread moves them, in order."""

    def __init__(self, arena: torch.Tensor, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES):
        page_bytes = arena.shape[1]
        self._arena = arena
        self._slot_pages = max(1, slot_bytes // page_bytes)
        self._slots = [
            _Slot(torch.empty(self._slot_pages, page_bytes, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
            for _ in range(slots)
        ]
        self._next = 0
        self._stream = torch.cuda.Stream(arena.device)
        self._jobs: queue.SimpleQueue[RingCopy] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="adapter-copies", daemon=True).start()

    def start(self, buffer: torch.Tensor, pages: list[int]) -> RingCopy:
        job = RingCopy(buffer, pages)
        self._jobs.put(job)
        return job

    def _work(self) -> None:
        torch.cuda.set_device(self._arena.device)
        while True:
            job = self._jobs.get()
            try:
                self._copy(job)
            except Exception as e:
                job.error = e

    @torch.inference_mode()
    def _copy(self, job: RingCopy) -> None:
        for first in range(0, len(job.pages), self._slot_pages):
            pages = job.pages[first : first + self._slot_pages]
            slot = self._slots[self._next]
            self._next = (self._next + 1) % len(self._slots)
            slot.free.synchronize()
            slot.memory[: len(pages)].copy_(job.buffer[first : first + len(pages)])
            with torch.cuda.stream(self._stream):
                for i, page in enumerate(pages):
                    self._arena[page].copy_(slot.memory[i], non_blocking=True)
                slot.free.record(self._stream)
        job.finished = torch.cuda.Event()
        job.finished.record(self._stream)
        job.queued.set()
