"""Processes that read and pack weights for the loader: Python's threads would wait for each other's GIL.

They are forked when the loader starts. They share two memories with it: a region into which files are read, and the
staging memory. An order names weights in the region and says where the pages go: into the staging memory, or into a
file whose descriptor comes along. The processes end with the loader. Called by `process.py`.
"""

import ctypes
import logging
import mmap
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from multilora.adapters.host.mapping import lies_in_memory
from multilora.adapters.host.shared_buffers import SharedBuffer, prefault_write
from multilora.adapters.packing.pack_jobs import PackJob, Span, write_job, write_jobs
from multilora.adapters.thread_pool import Slab
from multilora.errors import AdapterInvalid
from multilora.memory.first_fit import FirstFit

logger = logging.getLogger(__name__)

REGION_BYTES = 1 << 30  # address space; pages that were touched once stay with the loader
POPULATED_BYTES = 256 << 20  # what of it is touched at the start: room for three rank-16 adapters of an 8B model
ALIGN = 4096
LENGTH_BYTES = 8


class _RegionJob(msgspec.Struct, array_like=True, frozen=True):
    """A `PackJob` whose weight lies in the region. start: in bytes; shape and strides: in elements."""

    name: str
    start: int
    dtype: str
    shape: tuple[int, int]
    strides: tuple[int, int]
    scaling: float
    spans: tuple[Span, ...]


class _Pack(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """An order to pack. start: where the pages begin in the staging memory; None: in the file that comes along."""

    dtype: str
    jobs: list[_RegionJob]
    start: int | None


class _Read(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """An order to read parts of the file whose descriptor comes along into the region."""

    slabs: list[Slab]


class _Answer(msgspec.Struct, array_like=True, frozen=True):
    """The answer to one order. error: why packing failed, or empty; left: slabs that are not in the page cache."""

    error: str = ""
    left: list[Slab] = []


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

    def at(self, start: int, dtype: torch.dtype, shape: tuple[int, int], strides: tuple[int, int]) -> torch.Tensor:
        """The tensor of this shape and these strides (in elements) that begins at byte `start` of the region."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        flat = torch.frombuffer(self.memory, dtype=dtype, count=extent, offset=start)
        return flat.as_strided(shape, strides)


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
        shared: list[_RegionJob] = []
        here: list[PackJob] = []
        for job in jobs:
            start = self._region.offset_of(job.weight) if self._region and self._packers else None
            if start is None:
                here.append(job)
            else:
                shared.append(_describe(job, start))
        if shared and not self._pack_aside(shared, str(dtype).removeprefix("torch."), where):
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
        answers = self._order([_Read(moved[i::count]) for i in range(count)], fd)
        if answers is None:
            return slabs
        return [(first, at - start, nbytes) for answer in answers for first, at, nbytes in answer.left]

    def close(self) -> None:
        """End the processes once they have carried out their orders. Later adapters are packed without them."""
        with self._lock:
            for packer in self._packers:
                packer.connection.close()
                os.waitpid(packer.pid, 0)
            self._packers = []

    def _pack_aside(self, jobs: list[_RegionJob], dtype: str, where: SharedBuffer) -> bool:
        """Pack on the processes, with the jobs shared out evenly by size. False: the processes are gone."""
        count = len(self._packers)
        shares: list[list[_RegionJob]] = [[] for _ in range(count)]
        jobs.sort(key=lambda job: -job.shape[0] * job.shape[1])
        for i, job in enumerate(jobs if count else []):
            turn, at = divmod(i, count)
            shares[at if turn % 2 == 0 else count - 1 - at].append(job)
        start = where.start if where.fd is None else None
        answers = self._order([_Pack(dtype, share, start) for share in shares], where.fd)
        for error in (answer.error for answer in answers or () if answer.error):
            raise AdapterInvalid(error)
        return answers is not None

    def _order(self, orders: Sequence[_Pack | _Read], fd: int | None) -> list[_Answer] | None:
        """Send each process one order and return their answers. None: the processes are gone."""
        with self._lock:
            if not self._packers or len(orders) != len(self._packers):
                return None  # they have been closed since the orders were made
            try:
                for packer, order in zip(self._packers, orders, strict=True):
                    data = msgspec.msgpack.encode(order)
                    fds = [] if fd is None else [fd]
                    socket.send_fds(packer.connection, [len(data).to_bytes(LENGTH_BYTES, "little")], fds)
                    packer.connection.sendall(data)
                return [msgspec.msgpack.decode(_receive(p.connection), type=_Answer) for p in self._packers]
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
                self._serve(theirs)
            except ConnectionError:
                pass  # the loader was killed
            except Exception:
                logger.exception("a packing process failed")
            finally:
                os._exit(0)
        theirs.close()
        return _Packer(pid, ours)

    # ------------------------------------------------------------------ in the forked process

    def _serve(self, connection: socket.socket) -> None:
        """Carry out orders until the loader has closed its end."""
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        if self._staging is not None and self._region is not None:  # on a GPU; without one, memory is not worth it
            prefault_write(self._staging, 0, len(self._staging))
            prefault_write(self._region.memory, 0, min(POPULATED_BYTES, len(self._region.memory)))
        while True:
            header, fds, _, _ = socket.recv_fds(connection, LENGTH_BYTES, 1)
            if not header:
                return
            order = msgspec.msgpack.decode(_exactly(connection, int.from_bytes(header, "little")), type=_Pack | _Read)
            try:
                answer = self._read_here(order, fds[0]) if isinstance(order, _Read) else self._pack_here(order, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            _send(connection, msgspec.msgpack.encode(answer))

    def _read_here(self, order: _Read, fd: int) -> _Answer:
        assert self._region is not None
        view = memoryview(self._region.memory)
        return _Answer(left=[s for s in order.slabs if not read_cached(fd, s[0], view[s[1] : s[1] + s[2]])])

    def _pack_here(self, order: _Pack, fds: list[int]) -> _Answer:
        """Pack into the staging memory, or into the file. The file is mapped, because writes to one file wait for
        each other, and unmapped at once, because the process that unmaps it last pays for freeing its memory."""
        if order.start is not None:
            assert self._staging is not None
            return _Answer(self._pack_into(np.frombuffer(self._staging, np.uint8, offset=order.start), order))
        with mmap.mmap(fds[0], 0) as pages:
            return _Answer(self._pack_into(np.frombuffer(pages, np.uint8), order, pages))

    def _pack_into(self, target: np.ndarray, order: _Pack, fresh: mmap.mmap | None = None) -> str:
        """Pack all jobs of an order. fresh: the map behind `target`, if its pages have not been touched yet. Returns
        what is wrong with the adapter, or "": the traceback of an exception would keep `target` alive."""
        assert self._region is not None

        def put(at: int, part: np.ndarray) -> None:
            if fresh is not None:
                prefault_write(fresh, at, part.nbytes)
            target[at : at + part.nbytes] = part.reshape(-1).view(np.uint8)

        try:
            for job in order.jobs:
                weight = self._region.at(job.start, getattr(torch, job.dtype), job.shape, job.strides)
                write_job(PackJob(job.name, weight, job.scaling, job.spans), getattr(torch, order.dtype), put)
        except AdapterInvalid as e:
            return e.message
        return ""


def read_cached(fd: int, start: int, target: memoryview) -> bool:
    """Fill `target` from byte `start` of the file if all of it is in the page cache. False: `target` is undefined."""
    flag = 0 if lies_in_memory(fd) else getattr(os, "RWF_NOWAIT", None)  # Linux
    if flag is None:
        return False
    while target:
        try:
            got = os.preadv(fd, [target], start, flag)
        except OSError:  # not in the page cache, or the file system cannot tell
            return False
        if not got:
            return False  # the file ends; the caller's own read reports it
        start, target = start + got, target[got:]
    return True


def _describe(job: PackJob, start: int) -> _RegionJob:
    weight = job.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    shape, strides = (weight.shape[0], weight.shape[1]), weight.stride()
    return _RegionJob(job.name, start, dtype, shape, (strides[0], strides[1]), job.scaling, job.spans)


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(len(data).to_bytes(LENGTH_BYTES, "little") + data)


def _receive(connection: socket.socket) -> bytes:
    return _exactly(connection, int.from_bytes(_exactly(connection, LENGTH_BYTES), "little"))


def _exactly(connection: socket.socket, size: int) -> bytes:
    """The next `size` bytes. Raises OSError if the other end closes first."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionResetError("the other end is gone")
        view = view[got:]
    return bytes(data)
