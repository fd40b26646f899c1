"""The loader process' answers: each job is fetched on one of its threads, and what comes of it is sent once.

Called by `process.py`.
"""

import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Sequence

import torch

from multilora.adapters.host.shared_buffers import SharedBuffer, SharedBuffers
from multilora.adapters.loading.known_layouts import KnownLayouts
from multilora.adapters.loading.loader import FetchContext, Fetched, FetchJob, Shortcut, failed, fetch, unavailable
from multilora.adapters.loading.messages import Message, send
from multilora.adapters.loading.packers import Packers
from multilora.adapters.packing.pack_jobs import PackJob
from multilora.adapters.thread_pool import ReaderPool, spare_cores

logger = logging.getLogger(__name__)

MAX_READERS = 8  # threads, for all fetches together


class FetchServer:
    """What the fetches of the loader process share: the socket, the packers, the buffers and the reading threads."""

    def __init__(self, connection: socket.socket, context: FetchContext, packers: Packers, buffers: SharedBuffers):
        self._connection = connection
        self._context = context
        self._packers = packers
        self._buffers = buffers
        self._readers = ReaderPool(spare_cores(MAX_READERS), packers.memory, packers.read)
        self._layouts = KnownLayouts(packers.shares, context.target.dtype if context.on_gpu else None)
        self._sending = threading.Lock()

    def answer(self, job: FetchJob) -> None:
        """Fetch one adapter and send it. The buffer it takes is the engine's if the answer arrived, else freed."""
        taken: list[SharedBuffer] = []  # at most one

        def allocate(num_pages: int, page_bytes: int) -> torch.Tensor:
            while taken:  # the shortcut was not taken after all
                self._buffers.drop(taken.pop())
            taken.append(self._buffers.take(num_pages * page_bytes))
            return taken[0].tensor().view(num_pages, page_bytes)

        def write(pack_jobs: list[PackJob], dtype: torch.dtype, out: torch.Tensor) -> None:
            self._packers.write(pack_jobs, dtype, out, taken[0])

        def allocate_staged(num_pages: int, page_bytes: int) -> torch.Tensor | None:
            part = self._buffers.take_staged(num_pages * page_bytes)
            if part is None:
                return None
            taken.append(part)
            return part.tensor().view(num_pages, page_bytes)

        def load(shares: Sequence[bytes], dtype: torch.dtype, fd: int) -> bool:
            return self._packers.load(shares, dtype, fd, taken[0])

        def stage(
            shares: Sequence[bytes], begin: int, stored: str, dtype: torch.dtype, fd: int
        ) -> list[bytes] | None:
            return self._packers.stage(shares, begin, stored, dtype, fd, taken[0])

        shortcut = Shortcut(self._layouts, load, allocate_staged, stage)
        try:
            result, buffer = fetch(job, self._context, allocate, self._readers, write, shortcut)
        except Exception as e:
            logger.exception("reading adapter %s failed", job.path)
            result, buffer = unavailable(job.version, f"{job.path}: {e!r}"), None
        sent = self._send(job, result, taken[0] if buffer is not None else None)
        for shared in taken:
            if sent and buffer is not None:
                self._buffers.sent(shared)
            else:
                self._buffers.drop(shared)
        for work in shortcut.later:
            try:
                work()
            except Exception:
                logger.exception("adapters like %s load slower", job.path)

    def _send(self, job: FetchJob, result: Fetched, shared: SharedBuffer | None) -> bool:
        """Send the result. False: the engine did not get it; if it is still there, it gets an error instead."""
        message, fds = Message(result), []
        if shared is not None:
            message = Message(result, shared.size, shared.start if shared.fd is None else None)
            fds = [shared.fd] if shared.fd is not None else []
        try:
            with self._sending:
                send(self._connection, message, fds)
            return True
        except OSError as e:
            logger.warning("dropping adapter %s: the engine cannot be told of it: %s", job.path, e.strerror)
            describe = failed if e.errno == errno.EMSGSIZE else unavailable
            error = describe(job.version, f"{job.path[:100]}: what was found cannot be told: {e.strerror}")
        with contextlib.suppress(OSError), self._sending:  # it is gone
            send(self._connection, Message(error))
        return False
