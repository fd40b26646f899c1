"""Memory into which the loader packs and from which the engine reads: a part of the staging memory, or a file.

Staging memory is one region that both processes share, made once (the engine's end is `staging.py`). Where there is
none, or no room in it, an adapter comes in an anonymous memory file of its own. Called by `loading/`.
"""

import ctypes
import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from multilora.memory.first_fit import FirstFit

STAGING_ALIGN = 4096
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; Python's mmap does not name it


@dataclass(frozen=True)
class SharedBuffer:
    """Bytes [start, start + size) of `memory`, which are zero at first. fd: the file behind it, which is not mapped
    anywhere else; None: it is the staging memory."""

    memory: mmap.mmap
    start: int
    size: int
    fd: int | None

    def tensor(self) -> torch.Tensor:
        """uint8 [size]."""
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=self.size, offset=self.start)


class SharedBuffers:
    """Gives buffers out; thread-safe. staging: shared with the engine, all zero; in_use: it is not zero, and others
    may read and write there, so nothing of it is given out until `take_over`."""

    def __init__(self, staging: mmap.mmap | None = None, in_use: bool = False):
        self._staging = staging
        self._parts = FirstFit(len(staging) if staging is not None and not in_use else 0, STAGING_ALIGN)
        self._lock = threading.Lock()
        self._zeroing = ThreadPoolExecutor(1, "zeroing")

    def take(self, size: int) -> SharedBuffer:
        """A buffer of `size` zero bytes, which the caller hands to `sent` or `drop`. Raises OSError."""
        if (part := self.take_staged(size)) is not None:
            return part
        fd = anonymous_file(size)
        try:
            return SharedBuffer(mmap.mmap(fd, size), 0, size, fd)
        except OSError:
            os.close(fd)
            raise

    def take_staged(self, size: int) -> SharedBuffer | None:
        """The same in the staging memory; None: there is no room, or no such memory."""
        if self._staging is None:
            return None
        with self._lock:
            start = self._parts.take(size)
        return SharedBuffer(self._staging, start, size, None) if start is not None else None

    def sent(self, buffer: SharedBuffer) -> None:
        """The engine owns the buffer now: a file until its last user is gone, a part until `give_back`."""
        if buffer.fd is not None:
            os.close(buffer.fd)

    def drop(self, buffer: SharedBuffer) -> None:
        """Free a buffer that the engine did not get."""
        self.sent(buffer)
        if buffer.fd is None:
            self.give_back(buffer.start)

    def give_back(self, start: int) -> None:
        """Free the part of the staging memory at `start`, which is not read any more, once it is zero again."""
        self._zeroing.submit(self._free, start)

    def take_over(self) -> None:
        """Free all of the staging memory, once it is zero: nobody uses it, and no earlier part will be given back."""
        self._zeroing.submit(self._free_all)  # after the parts that were given back before

    def _free_all(self) -> None:
        assert self._staging is not None and not self._parts.size, "this loader owns it already"
        self._zero(0, len(self._staging))
        with self._lock:  # an allocator of size 0 until here: nothing could be given out
            self._parts = FirstFit(len(self._staging), STAGING_ALIGN)

    def _free(self, start: int) -> None:
        with self._lock:
            size = self._parts.length_of(start)
        if size is None or self._staging is None:
            return  # a part that a predecessor gave out
        # the part stays taken until it is zero: take() promises zero bytes
        self._zero(start, size)
        with self._lock:
            self._parts.give_back(start)

    def _zero(self, start: int, size: int) -> None:
        assert self._staging is not None
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(self._staging, start)), 0, size)


def prefault_write(memory: mmap.mmap, start: int, size: int) -> bool:
    """Fault in the pages of a part for writing, in one call; its bytes stay as they are. False: there is too little
    memory, so that touching them may end the process with a signal. See `mapping.prefault_read` for reading."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        memory.madvise(POPULATE_WRITE, first, start + size - first)
    except OSError as e:
        return e.errno == errno.EINVAL  # an older kernel: pages are faulted in when they are touched
    return True


def anonymous_file(size: int) -> int:
    """The descriptor of `size` zero bytes: memory, or else an unlinked temporary file. Raises OSError."""
    resize: Callable[[int, int], None]
    try:
        fd, resize = os.memfd_create("multilora-adapter"), os.ftruncate
    except (AttributeError, OSError):  # not Linux, or a sandbox
        with tempfile.TemporaryFile() as file:
            fd, resize = os.dup(file.fileno()), _reserve
    try:
        resize(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def _reserve(fd: int, size: int) -> None:
    """Allocate the blocks of a file on disk, so that a full disk is an error now and no SIGBUS later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)
