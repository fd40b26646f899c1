"""Memory of packed pages as tensors: mapped files, and private pages.

Called by `loading/`, `staging.py` and `device/ring_copier.py`.
"""

import contextlib
import ctypes
import mmap
import sys

import torch

POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: map pages that are there already, at once instead of by faults
POPULATE_BYTES = 4 << 20  # at a time, as whoever maps something else in this process waits meanwhile

TMPFS = 0x01021994

_fstatfs = ctypes.CDLL(None).fstatfs if sys.platform == "linux" else None
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_file(fd: int, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes]. (A Python mmap would keep a descriptor for as long as it lives; this does not.)"""
    return torch.from_file(f"/dev/fd/{fd}", shared=True, size=nbytes, dtype=torch.uint8)


def populate(memory: torch.Tensor) -> None:
    """Bring in the pages of a contiguous tensor that begins with one, for reading. Holds no GIL. An older kernel does
    nothing: pages come when they are touched."""
    start, nbytes = memory.data_ptr(), memory.nbytes
    for at in range(0, nbytes, POPULATE_BYTES):
        _madvise(start + at, min(POPULATE_BYTES, nbytes - at), POPULATE_READ)


def lies_in_memory(fd: int) -> bool:
    """Whether the file is on a file system of memory (Linux' tmpfs)."""
    status = (ctypes.c_long * 64)()  # a struct statfs, which begins with the file system's type
    return _fstatfs is not None and _fstatfs(fd, status) == 0 and status[0] == TMPFS


def own_memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], zero; in huge pages if the system has some to give: fewer to bring in and to give back."""
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
