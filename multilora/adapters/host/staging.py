"""Staging memory: where the loader packs adapters, pinned, so that the device copies at the full speed of the link.

It is one region of fixed size, shared with the loader and pinned once, at the start: to pin each adapter's own memory
would delay running steps. An adapter stays in it only until a thread of this file has moved it to ordinary memory
(and while there is too little, the thread tries again); then the loader may pack another one there. The loader's end
is in `shared_buffers.py`. Called by `engine/build.py`; `loading/process.py` owns it, the adapter store calls
`settle`.

    part of the region   taken by the loader -> view() here, sent by the loader -> settle() moves the entry to its own
                         memory -> the last view goes -> release(start) -> zeroed and free again, at the loader
"""

import contextlib
import ctypes
import logging
import mmap
import os
import queue
import threading
import weakref
from collections.abc import Callable

import numpy as np
import torch

from multilora.adapters.host.mapping import HostEntry, own_memory
from multilora.adapters.host.shared_buffers import anonymous_file, prefault_write

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10
RETRY_SECONDS = 5.0  # after memory was short
STAGING_BYTES = 1 << 30
"""Room for twelve rank-16 adapters of an 8B model. A larger adapter comes in a file of its own."""


class Staging:
    """The region, of `nbytes`. Its memory is not pinned before `pin`."""

    def __init__(self, nbytes: int = STAGING_BYTES):
        self.nbytes = nbytes
        self.fd = anonymous_file(nbytes)
        self._memory = mmap.mmap(self.fd, nbytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._pinned = False
        self._closed = False
        self._views = 0
        self._lock = threading.RLock()  # reentrant: a finalizer may run while its own thread holds it
        self._to_settle: queue.SimpleQueue[weakref.ref[HostEntry] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._settle_all, name="adapter-settling", daemon=True)
        self._thread.start()

    def pin(self) -> bool:
        """Pin the memory for CUDA. False: that failed, as the log says, and the region is of no use."""
        filled = prefault_write(self._memory, 0, self.nbytes)
        error = register(self._address, self.nbytes) if filled else "too little memory"
        self._pinned = error is None
        if error is not None:
            logger.warning("adapters load slower: their staging memory cannot be pinned: %s", error)
        return self._pinned

    @property
    def path(self) -> str:
        """Where another process of the same user opens the region, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def offset_of(self, memory: torch.Tensor) -> int | None:
        """At which byte of the region this memory begins; None: it lies elsewhere."""
        offset = memory.data_ptr() - self._address
        return offset if 0 <= offset < self.nbytes else None

    def view(self, start: int, nbytes: int, release: Callable[[int], None]) -> torch.Tensor:
        """uint8 [nbytes] from byte `start` on. `release(start)` is called, on any thread, once no view of that memory
        is left; the part counts as used until it has returned."""
        part = (ctypes.c_ubyte * nbytes).from_buffer(self._memory, start)
        with self._lock:
            self._views += 1
        weakref.finalize(part, self._gone, start, release).atexit = False
        return torch.frombuffer(part, dtype=torch.uint8)

    @property
    def unused(self) -> bool:
        """Whether no view is left and every `release` has returned."""
        with self._lock:
            return not self._views

    def settle(self, entry: HostEntry) -> None:
        """Have `entry.buffer` moved out of the region, soon, if it lies there. Readers keep the old one alive."""
        if self.offset_of(entry.buffer) is not None:
            self._to_settle.put(weakref.ref(entry))

    def close(self) -> None:
        """Stop the thread; no more views may be made. The memory is unpinned with the last view."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self.fd)
            self._to_settle.put(None)
            self._unpin()
        self._thread.join(CLOSE_SECONDS)  # without the lock, which the thread may need

    def _gone(self, start: int, release: Callable[[int], None]) -> None:
        """The last view of the part at `start` is gone. Called by a finalizer, on any thread."""
        try:
            release(start)
        finally:
            with self._lock:
                self._views -= 1
                self._unpin()

    def _unpin(self) -> None:
        if self._pinned and self._closed and not self._views:
            unregister(self._address)
            self._pinned = False

    def _settle_all(self) -> None:
        unmoved: list[weakref.ref[HostEntry]] = []  # tried again with each new entry and every RETRY_SECONDS
        while (found := self._next(RETRY_SECONDS if unmoved else None)) is not None:
            unmoved = [entry for entry in unmoved if _move_error(entry)]
            for entry in found:
                if error := _move_error(entry):
                    logger.warning("an adapter stays in the staging memory: %s", error)
                    unmoved.append(entry)

    def _next(self, seconds: float | None) -> list[weakref.ref[HostEntry]] | None:
        """The next entry, in a list that is empty after `seconds` without one. None: no more will come."""
        try:
            found = self._to_settle.get(timeout=seconds)
        except queue.Empty:
            return []
        return None if found is None else [found]


def register(address: int, nbytes: int) -> object:
    """Pin memory of this process for CUDA, on the current device. Returns what kept CUDA from it, or None."""
    error = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
    if error == 0:
        return None
    _forget_cuda_error()
    return error


def unregister(address: int) -> None:
    """The opposite of `register`."""
    torch.cuda.cudart().cudaHostUnregister(address)


def _forget_cuda_error() -> None:
    """Clear the error that a failed CUDA call has left for the next kernel launch to raise."""
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")


def _move_error(found: weakref.ref[HostEntry]) -> str:
    """Move the entry, if it still exists. Returns why that failed, most likely for want of memory, or ""."""
    entry = found()
    try:
        if entry is not None:
            _move(entry)
    except Exception as e:  # noqa: BLE001 (the thread logs it and tries again later; it must not end)
        return str(e) or repr(e)
    return ""


def _move(entry: HostEntry) -> None:
    own = own_memory(entry.buffer.numel()).view(entry.buffer.shape)
    np.copyto(own.numpy(), entry.buffer.numpy())  # releases the GIL
    entry.buffer = own  # drops a reference to the staging memory; the part is free with the last reader's
