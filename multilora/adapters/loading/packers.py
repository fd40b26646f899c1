"""Processes that read and pack weights for the loader: Python's threads would wait for each other's GIL.

They are forked when the loader starts. They share two memories with it: a region into which files are read, and the
staging memory. An order names weights, in the region or in a file, and says where the pages go: into the staging
memory, or into a file whose descriptor comes along. The processes end with the loader. Called by `process.py`; what
they do is in `packing_process.py`.
"""

import ctypes
import logging
import mmap
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch

from multilora.adapters.host.shared_buffers import SharedBuffer
from multilora.adapters.loading.packing_process import (
    LENGTH_BYTES,
    Load,
    Pack,
    PackingAnswer,
    PackingOrder,
    PackingProcess,
    Read,
    Stage,
    encode_share,
    exactly,
)
from multilora.adapters.packing.pack_jobs import PackJob, write_jobs
from multilora.adapters.packing.placed_jobs import FilePart, FileWeight, PlacedJob
from multilora.adapters.thread_pool import Slab
from multilora.errors import AdapterInvalid
from multilora.memory.first_fit import FirstFit

logger = logging.getLogger(__name__)

T = TypeVar("T")

REGION_BYTES = 1 << 30  # address space; pages that were touched once stay with the loader
ALIGN = 4096


class Region:
    """Memory shared with processes forked later: given out by first fit, taken back with the last view of a part."""

    def __init__(self, size: int):
        self._size = size
        self.memory = mmap.mmap(-1, size)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._parts = FirstFit(size, ALIGN)
        self._freed: deque[int] = deque()  # starts, from finalizers, which may run at any moment
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], in the region if that has room, else in private memory."""
        with self._lock:
            while self._freed:
                self._parts.give_back(self._freed.popleft())
            start = self._parts.take(nbytes) if nbytes else None
            if start is None:
                return torch.empty(nbytes, dtype=torch.uint8)
        memory = (ctypes.c_ubyte * nbytes).from_buffer(self.memory, start)
        weakref.finalize(memory, self._freed.append, start)
        return torch.frombuffer(memory, dtype=torch.uint8)  # which keeps `memory` as long as any view of it lives

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """The byte of the region at which the tensor begins; None: it lies elsewhere."""
        start = tensor.data_ptr() - self._start
        return start if 0 <= start < self._size else None


@dataclass(frozen=True)
class _Packer:
    """One process, seen from the loader."""

    pid: int
    connection: socket.socket


class Packers:
    """`count` processes. With 0, or once one of them has died, the caller's own thread packs everything.

    It forks, so it must be made before any thread is started. inherited: a socket that the processes close; staging:
    memory shared with the engine.
    """

    def __init__(
        self,
        count: int,
        inherited: socket.socket | None = None,
        staging: mmap.mmap | None = None,
        region_bytes: int = REGION_BYTES,
    ):
        self._region: Region | None = None
        self._staging = staging
        self._packers: list[_Packer] = []
        self._lock = threading.RLock()  # an order that fails closes them
        try:
            self._region = Region(region_bytes) if count else None
            for _ in range(count):
                self._packers.append(self._fork(inherited))
        except OSError as e:  # a limit on memory, processes or descriptors
            logger.warning("adapters load slower: %d of %d packing processes: %s", len(self._packers), count, e)

    def memory(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] to read weights into, where the processes see them."""
        return self._region.allocate(nbytes) if self._region else torch.empty(nbytes, dtype=torch.uint8)

    def write(self, jobs: list[PackJob], dtype: torch.dtype, out: torch.Tensor, where: SharedBuffer) -> None:
        """Run all jobs into the pages `out`, a view of the buffer `where`. Raises AdapterInvalid."""
        shared: list[PlacedJob] = []
        here: list[PackJob] = []
        for job in jobs:
            start = self._region.offset_of(job.weight) if self._region and self._packers else None
            if start is None:
                here.append(job)
            else:
                shared.append(PlacedJob.of(job, start))
        if shared and not self._pack_aside(shared, dtype, where):
            here = jobs
        write_jobs(here, dtype, out)

    def read(self, fd: int, slabs: list[Slab], memory: torch.Tensor) -> list[Slab]:
        """A `ReadCached` (see `thread_pool.py`): read what is in the page cache. The rest is left to the caller's
        threads, since a slow disk would delay other adapters' packing."""
        start = self._region.offset_of(memory) if self._region else None
        count = len(self._packers)
        if start is None or not count:
            return slabs
        moved = [(first, start + at, nbytes) for first, at, nbytes in slabs]
        answers = self._order([Read(moved[i::count]) for i in range(count)], [fd])
        if answers is None:
            return slabs
        return [(first, at - start, nbytes) for answer in answers for first, at, nbytes in answer.left]

    def shares(self, items: Sequence[FileWeight | FilePart]) -> list[bytes]:
        """All weights or parts of a file, shared out evenly among the processes, for `load` and `stage`. Empty: there
        are no processes."""
        return [encode_share(share) for share in _evenly(items, len(self._packers), lambda item: item.nbytes)]

    def load(self, shares: Sequence[bytes], dtype: torch.dtype, fd: int, where: SharedBuffer) -> bool:
        """Read what `shares` say from the file and pack it into the pages in `where`. False: something of it is not
        in the page cache, or the processes are gone; then what was written is of no use. Raises AdapterInvalid."""
        start, fds = (where.start, [fd]) if where.fd is None else (None, [fd, where.fd])
        answers = self._order([Load(_name(dtype), share, start) for share in shares], fds)
        return _checked(answers) and not any(answer.left for answer in answers or ())

    def stage(
        self, shares: Sequence[bytes], begin: int, stored: str, dtype: torch.dtype, fd: int, where: SharedBuffer
    ) -> list[bytes] | None:
        """Read the file as `shares` say into `where`, a part of the staging memory, from byte `begin` on, and check
        it as `load` does. Returns the digests of all of its parts, in order; None where `load` returns False."""
        orders = [Stage(stored, _name(dtype), share, begin, where.start) for share in shares]
        answers = self._order(orders, [fd])
        if not _checked(answers) or answers is None or any(answer.left for answer in answers):
            return None
        return [digest for _, digest in sorted(digest for answer in answers for digest in answer.digests)]

    def close(self) -> None:
        """End the processes once they have carried out their orders. Later adapters are packed without them."""
        with self._lock:
            for packer in self._packers:
                packer.connection.close()
                os.waitpid(packer.pid, 0)
            self._packers = []

    def _pack_aside(self, jobs: list[PlacedJob], dtype: torch.dtype, where: SharedBuffer) -> bool:
        """Pack on the processes, with the jobs shared out evenly by size. False: the processes are gone."""
        shares = _evenly(jobs, len(self._packers), lambda job: job.shape[0] * job.shape[1])
        start, fds = (where.start, []) if where.fd is None else (None, [where.fd])
        return _checked(self._order([Pack(_name(dtype), share, start) for share in shares], fds))

    def _order(self, orders: Sequence[PackingOrder], fds: list[int]) -> list[PackingAnswer] | None:
        """Send each process one order and return their answers. None: the processes are gone."""
        with self._lock:
            if not self._packers or len(orders) != len(self._packers):
                return None  # they have been closed since the orders were made
            try:
                for packer, order in zip(self._packers, orders, strict=True):
                    data = msgspec.msgpack.encode(order)
                    socket.send_fds(packer.connection, [len(data).to_bytes(LENGTH_BYTES, "little")], fds)
                    packer.connection.sendall(data)
                return [_answer(packer.connection) for packer in self._packers]
            except OSError:
                logger.exception("a packing process has died; packing without them from now on")
                self.close()
                return None
            except BaseException:  # else the rest of this answer would be taken for the next one
                self.close()
                raise

    def _fork(self, inherited: socket.socket | None) -> _Packer:
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            for end in (ours, inherited, *(packer.connection for packer in self._packers)):
                if end is not None:
                    end.close()
            try:
                assert self._region is not None
                PackingProcess(self._region.memory, self._staging).serve(theirs)
            except ConnectionError:
                pass  # the loader was killed
            except Exception:
                logger.exception("a packing process failed")
            finally:
                os._exit(0)
        theirs.close()
        return _Packer(pid, ours)


def _evenly(items: Sequence[T], count: int, size: Callable[[T], int]) -> list[list[T]]:
    """The items in `count` shares: the largest first, from the first share to the last and back again."""
    shares: list[list[T]] = [[] for _ in range(count)]
    for i, item in enumerate(sorted(items, key=lambda item: -size(item)) if count else ()):
        turn, at = divmod(i, count)
        shares[at if turn % 2 == 0 else count - 1 - at].append(item)
    return shares


def _checked(answers: list[PackingAnswer] | None) -> bool:
    """Whether there are answers. Raises AdapterInvalid with the first error in them."""
    for error in (answer.error for answer in answers or () if answer.error):
        raise AdapterInvalid(error)
    return answers is not None


def _answer(connection: socket.socket) -> PackingAnswer:
    data = exactly(connection, int.from_bytes(exactly(connection, LENGTH_BYTES), "little"))
    return msgspec.msgpack.decode(data, type=PackingAnswer)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
