"""Memory of packed pages as tensors: mapped files, and private pages.

Called by `loading/`, `staging.py` and `device/ring_copier.py`.
"""

import contextlib
import ctypes
import mmap
import sys
from dataclasses import dataclass

import torch

from multilora.adapters.pack_table import PackTable
from multilora.lora.panels import PanelLayout

POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: map pages that are there already, at once instead of by faults
POPULATE_BYTES = 4 << 20  # per call, because other threads of the process cannot map memory meanwhile

TMPFS = 0x01021994

_fstatfs = ctypes.CDLL(None).fstatfs if sys.platform == "linux" else None
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass
class HostEntry:
    """An adapter in host memory. buffer: uint8 [ranks · layout.num_pages, page_bytes], ready to copy to the devices,
    the pages of rank 0 first; with a table, the bytes of its file's tensors, in as many pages or fewer, which a GPU
    packs by it."""

    layout: PanelLayout
    buffer: torch.Tensor
    table: PackTable | None = None

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()


def map_file(fd: int, nbytes: int) -> torch.Tensor:
    """The first bytes of a file, shared, uint8 [nbytes]. Unlike a Python mmap it keeps no descriptor open."""
    return torch.from_file(f"/dev/fd/{fd}", shared=True, size=nbytes, dtype=torch.uint8)


def prefault_read(memory: torch.Tensor) -> None:
    """Fault in the pages of a contiguous, page-aligned tensor for reading, without the GIL. An older kernel does
    nothing: pages are faulted in when they are touched. See `shared_buffers.prefault_write` for writing."""
    start, nbytes = memory.data_ptr(), memory.nbytes
    for at in range(0, nbytes, POPULATE_BYTES):
        _madvise(start + at, min(POPULATE_BYTES, nbytes - at), POPULATE_READ)


def lies_in_memory(fd: int) -> bool:
    """Whether the file lies on a file system in memory (Linux' tmpfs)."""
    status = (ctypes.c_long * 64)()  # a struct statfs, which begins with the file system's type
    return _fstatfs is not None and _fstatfs(fd, status) == 0 and status[0] == TMPFS


def own_memory(nbytes: int) -> torch.Tensor:
    """Private uint8 [nbytes], all zero, in huge pages if the system has some: fewer faults, and faster to free."""
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
