"""One packing process: it reads and packs weights as the loader's orders say, until the loader has gone.

What the two say to each other is here, too. The process is forked from the loader and sees the same memory: the
region into which files are read, and the staging memory. Called by `packers.py`.
"""

import mmap
import os
import socket
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np
import torch

from multilora.adapters.host.mapping import lies_in_memory
from multilora.adapters.host.shared_buffers import prefault_write
from multilora.adapters.packing.pack_jobs import Put, check_numbers, write_job, write_part
from multilora.adapters.packing.placed_jobs import FilePart, FileWeight, PlacedJob
from multilora.adapters.sources.fingerprint import part_digest
from multilora.adapters.thread_pool import Slab
from multilora.errors import AdapterInvalid

POPULATED_BYTES = 256 << 20  # of the region, touched at the start: room for three rank-16 adapters of an 8B model
KEPT_BYTES = 8 << 20  # of memory for a weight, from one adapter to the next
LENGTH_BYTES = 8


class Pack(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """An order to pack. start: where the pages begin in the staging memory; None: in the file that comes along."""

    dtype: str
    jobs: list[PlacedJob]
    start: int | None


class Read(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """An order to read parts of the file whose descriptor comes along into the region."""

    slabs: list[Slab]


class Load(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """An order to read weights of the file whose descriptor comes along and to pack each at once. share: of
    `encode_share`; start: as of `Pack`, whose file comes second."""

    dtype: str
    share: bytes
    start: int | None


class Stage(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """An order to read parts of the file whose descriptor comes along into the staging memory, where byte `begin` of
    the file lies at `start`, to check their numbers for what packing will make of them, and to digest them. share: of
    `encode_share`; stored: of the numbers in the file; dtype: of packed ones."""

    stored: str
    dtype: str
    share: bytes
    begin: int
    start: int


PackingOrder = Pack | Read | Load | Stage


class PackingAnswer(msgspec.Struct, array_like=True, frozen=True):
    """The answer to one order. error: why packing failed, or empty; left: slabs that are not in the page cache; of a
    `Load` or a `Stage`, what was found missing first; digests: of a `Stage`, by the start of each part."""

    error: str = ""
    left: list[Slab] = []
    digests: list[tuple[int, bytes]] = []


def encode_share(items: Sequence[FileWeight | FilePart]) -> bytes:
    """What one process reads of an adapter. It is the same for all adapters that are alike."""
    return msgspec.msgpack.encode(items)


@lru_cache(maxsize=32)
def _weights_of(share: bytes) -> list[FileWeight]:
    return msgspec.msgpack.decode(share, type=list[FileWeight])


@lru_cache(maxsize=32)
def _parts_of(share: bytes) -> list[FilePart]:
    return msgspec.msgpack.decode(share, type=list[FilePart])


class PackingProcess:
    """The process' own end. region, staging: memory that it shares with the loader."""

    def __init__(self, region: mmap.mmap, staging: mmap.mmap | None):
        self._region = region
        self._staging = staging
        self._weight = bytearray()  # the one that is being loaded, which so stays in the core's cache

    def serve(self, connection: socket.socket) -> None:
        """Carry out orders until the loader has closed its end."""
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        if self._staging is not None:  # on a GPU; without one, memory is not worth it
            prefault_write(self._staging, 0, len(self._staging))
            prefault_write(self._region, 0, min(POPULATED_BYTES, len(self._region)))
        while True:
            header, fds, _, _ = socket.recv_fds(connection, LENGTH_BYTES, 2)
            if not header:
                return
            order = msgspec.msgpack.decode(exactly(connection, int.from_bytes(header, "little")), type=PackingOrder)
            try:
                answer = self._carry_out(order, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            data = msgspec.msgpack.encode(answer)
            connection.sendall(len(data).to_bytes(LENGTH_BYTES, "little") + data)

    def _carry_out(self, order: PackingOrder, fds: list[int]) -> PackingAnswer:
        if isinstance(order, Read):
            view = memoryview(self._region)
            left = [s for s in order.slabs if not read_cached(fds[0], s[0], view[s[1] : s[1] + s[2]])]
            return PackingAnswer(left=left)
        if isinstance(order, Stage):
            return self._stage(order, fds[0])
        if order.start is not None:
            assert self._staging is not None
            return self._fill(
                np.frombuffer(self._staging, np.uint8, offset=order.start), order, fds[0] if fds else -1
            )
        # The file is mapped, because writes to one file wait for each other, and unmapped at once, because the
        # process that unmaps it last pays for freeing its memory.
        with mmap.mmap(fds[-1], 0) as pages:
            return self._fill(np.frombuffer(pages, np.uint8), order, fds[0], pages)

    def _fill(self, target: np.ndarray, order: Pack | Load, fd: int, fresh: mmap.mmap | None = None) -> PackingAnswer:
        """Pack all that an order asks for. fresh: the map behind `target`, if its pages have not been touched yet.
        What is wrong with the adapter is returned: the traceback of an exception would keep `target` alive."""

        def put(at: int, part: np.ndarray) -> None:
            if fresh is not None:
                prefault_write(fresh, at, part.nbytes)
            write_part(target, at, part)

        dtype = getattr(torch, order.dtype)
        try:
            if isinstance(order, Load):
                return self._load(_weights_of(order.share), dtype, fd, put)
            for job in order.jobs:
                write_job(job.within(self._region), dtype, put)
        except AdapterInvalid as e:
            return PackingAnswer(e.message)
        return PackingAnswer()

    def _load(self, weights: list[FileWeight], dtype: torch.dtype, fd: int, put: Put) -> PackingAnswer:
        """Read and pack one weight after the other, as long as they are in the page cache."""
        for weight in weights:
            if len(self._weight) < weight.nbytes:
                self._weight = bytearray(weight.nbytes)
            if not read_cached(fd, weight.start, memoryview(self._weight)[: weight.nbytes]):
                return PackingAnswer(left=[(weight.start, 0, weight.nbytes)])
            for job in weight.jobs:
                write_job(job.within(self._weight), dtype, put)
        if len(self._weight) > KEPT_BYTES:
            self._weight = bytearray()
        return PackingAnswer()

    def _stage(self, order: Stage, fd: int) -> PackingAnswer:
        """Read, check and digest one part after the other, as long as they are in the page cache. What is before the
        tensors is digested only."""
        assert self._staging is not None
        staging, digests = memoryview(self._staging), list[tuple[int, bytes]]()
        stored, dtype = getattr(torch, order.stored), getattr(torch, order.dtype)
        try:
            for part in _parts_of(order.share):
                header = memoryview(bytearray(min(max(order.begin - part.start, 0), part.nbytes)))
                at = order.start + part.start - order.begin
                view = staging[at + len(header) : at + part.nbytes]
                if not (read_cached(fd, part.start, header) and read_cached(fd, part.start + len(header), view)):
                    return PackingAnswer(left=[(part.start, 0, part.nbytes)])
                digests.append((part.start, part_digest(header, view)))
                for numbers in part.numbers:
                    first = at + numbers.start
                    found = torch.frombuffer(staging[first : first + numbers.nbytes], dtype=stored)
                    check_numbers(found, numbers.scaling, dtype, numbers.name)
        except AdapterInvalid as e:
            return PackingAnswer(e.message)
        return PackingAnswer(digests=digests)


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


def exactly(connection: socket.socket, size: int) -> bytes:
    """The next `size` bytes. Raises OSError if the other end closes first."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionResetError("the other end is gone")
        view = view[got:]
    return bytes(data)
