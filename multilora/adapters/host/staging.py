"""Staging memory: pinned memory into which the loader packs, so that the device copies at the full speed of the link.

One region of fixed size, shared with the loader, pinned once at the start: pinning an adapter's own memory when it
comes would make a running step late. An adapter stays in it only until a thread of this file has moved it into
ordinary memory, which it tries again while there is none; then the loader may pack another one there. The loader's
end is in `shared_buffers.py`. The loader's engine end owns the region; the adapter store calls `settle`.
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
from multilora.adapters.host.shared_buffers import anonymous_file, populate_for_writing

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10
RETRY_SECONDS = 5.0  # after memory was short
STAGING_BYTES = 1 << 30
"""Room for twelve rank-16 adapters of an 8B model. A larger adapter comes in a file of its own."""


class Staging:
    """The engine's end of a region of `nbytes`. Its memory is ordinary until `pin`."""

    def __init__(self, nbytes: int = STAGING_BYTES):
        self.nbytes = nbytes
        self.fd = anonymous_file(nbytes)
        self._memory = mmap.mmap(self.fd, nbytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._pinned = False
        self._closed = False
        self._views = 0
        self._lock = threading.RLock()  # a view may go at any moment, also while this thread holds it
        self._to_settle: queue.SimpleQueue[weakref.ref[HostEntry] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._settle_all, name="adapter-settling", daemon=True)
        self._thread.start()

    def pin(self) -> bool:
        """Pin the memory for CUDA. False: it cannot be pinned, as the log says, and is of no use then."""
        error: object = "too little memory"
        if populate_for_writing(self._memory, 0, self.nbytes):
            error = torch.cuda.cudart().cudaHostRegister(self._address, self.nbytes, 0)
            self._pinned = error == 0
        if not self._pinned:
            logger.warning("adapters load slower: their staging memory cannot be pinned: %s", error)
            _forget_cuda_error()
        return self._pinned

    def view(self, start: int, nbytes: int, release: Callable[[int], None]) -> torch.Tensor:
        """uint8 [nbytes] from `start` on. `release(start)` is called, on any thread, when no view of it is left; the
        view counts as used until it has returned."""
        part = (ctypes.c_ubyte * nbytes).from_buffer(self._memory, start)
        with self._lock:
            self._views += 1
        weakref.finalize(part, self._gone, start, release).atexit = False
        return torch.frombuffer(part, dtype=torch.uint8)

    @property
    def unused(self) -> bool:
        """No view is left, and of every one its `release` has returned."""
        with self._lock:
            return not self._views

    def settle(self, entry: HostEntry) -> None:
        """Move the entry out of the region, if it is there: `entry.buffer` is soon memory of its own. Readers of the
        old buffer keep it."""
        if 0 <= entry.buffer.data_ptr() - self._address < self.nbytes:
            self._to_settle.put(weakref.ref(entry))

    def close(self) -> None:
        """Make no more views. The memory is freed with the last view."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self.fd)
            self._to_settle.put(None)
            self._unpin()
        self._thread.join(CLOSE_SECONDS)  # without the lock, which the thread may need

    def _gone(self, start: int, release: Callable[[int], None]) -> None:
        try:
            release(start)
        finally:
            with self._lock:
                self._views -= 1
                self._unpin()

    def _unpin(self) -> None:
        if self._pinned and self._closed and not self._views:
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._pinned = False

    def _settle_all(self) -> None:
        stay: list[weakref.ref[HostEntry]] = []  # tried again with the next that comes, and now and then
        while (found := self._next(RETRY_SECONDS if stay else None)) is not None:
            stay = [entry for entry in stay if _trouble_moving(entry)]
            for entry in found:
                if trouble := _trouble_moving(entry):
                    logger.warning("an adapter stays in the staging memory: %s", trouble)
                    stay.append(entry)

    def _next(self, seconds: float | None) -> list[weakref.ref[HostEntry]] | None:
        """The next entry to move, or none after that time. None: the region is closed."""
        try:
            found = self._to_settle.get(timeout=seconds)
        except queue.Empty:
            return []
        return None if found is None else [found]


def _forget_cuda_error() -> None:
    """Clear the error that a failed call leaves behind, which the next kernel launch would raise."""
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")


def _trouble_moving(found: weakref.ref[HostEntry]) -> str:
    """Move the entry, if it still exists. Returns why that failed (too little memory, most likely), or nothing."""
    entry = found()
    try:
        if entry is not None:
            _move(entry)
    except Exception as e:  # noqa: BLE001 - the thread goes on; the caller logs it
        return str(e) or repr(e)
    return ""


def _move(entry: HostEntry) -> None:
    own = own_memory(entry.buffer.numel()).view(entry.buffer.shape)
    np.copyto(own.numpy(), entry.buffer.numpy())  # holds no GIL
    entry.buffer = own
