"""Anonymous memory files for packed pages, so that the loader process can hand them to the engine.

A fresh page of memory costs more than copying into it, so one spare file is kept whose pages are there already: about
as large as the last adapter, filled while nothing else is to do. Called by the loader process.
"""

import contextlib
import mmap
import os
import tempfile
import threading
from collections.abc import Callable

MAX_SPARE_BYTES = 1 << 30
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; Python's mmap does not name it
POPULATE_BYTES = 2 << 20  # at a time: Python holds the GIL meanwhile


class PageFile:
    """`size` zero bytes, mapped; whoever gets the descriptor too shares them."""

    def __init__(self, size: int):
        self.fd = _anonymous_file()
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)

    def shrink(self, size: int) -> None:
        """Give back what is beyond `size`. The mapping keeps its length; nobody may touch the rest."""
        if size < len(self.memory):
            os.ftruncate(self.fd, size)

    def close(self) -> None:
        """The descriptor. The memory goes with its last user."""
        os.close(self.fd)


class PageFiles:
    """Makes files. Any thread may call."""

    def __init__(self) -> None:
        self._spare: PageFile | None = None
        self._lock = threading.Lock()

    def take(self, size: int) -> PageFile:
        """A file of `size` zero bytes or more; the spare one if it is large enough."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None and size <= len(spare.memory):
            return spare
        if spare is not None:
            spare.close()
        return PageFile(size)

    def prepare(self, size: int, announce: Callable[[PageFile], None] = lambda spare: None) -> None:
        """Make a spare file of `size` bytes ready, unless there is one. It may be taken meanwhile; else `announce`
        is told of it before it can be."""
        with self._lock:
            if self._spare is not None or size > MAX_SPARE_BYTES:
                return
            spare = self._spare = PageFile(size)
        for start in range(0, size, POPULATE_BYTES):
            if self._spare is not spare:
                return
            populate(spare.memory, start, min(POPULATE_BYTES, size - start))
        with self._lock:
            if self._spare is spare:
                announce(spare)

    def close(self) -> None:
        with self._lock:
            if self._spare is not None:
                self._spare.close()
                self._spare = None


def populate(memory: mmap.mmap, start: int, size: int) -> None:
    """Bring in the pages of this part in one go, for writing. Its bytes stay as they are."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):  # an older kernel: pages come when they are touched
        memory.madvise(POPULATE_WRITE, first, start + size - first)


def _anonymous_file() -> int:
    """A file in memory that nobody else can open (Linux), or an unlinked temporary file."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("multilora-adapter")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
