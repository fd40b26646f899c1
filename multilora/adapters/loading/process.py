"""The loader as a process of its own, so that reading, checking and packing never hold the step loop's GIL.

The two ends share a Unix socket, and on a GPU the staging memory. Jobs go one way; results come back with the offset
of the packed pages in that memory, or with the descriptor of an anonymous memory file that holds them. A file is used
once; a part of the staging memory is used again once the engine has said that nobody reads it any more. Nothing has a
name in the file system, so nothing is left behind when a process dies.
`ProcessLoader` runs this file as `python -m multilora.adapters.loading.process`. Called by `engine/build.py`.
"""

import contextlib
import gc
import logging
import mmap
import os
import signal
import socket
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic

import msgspec
import torch

from multilora.adapters.host.mapping import map_file
from multilora.adapters.host.shared_buffers import SharedBuffers
from multilora.adapters.host.staging import Staging
from multilora.adapters.loading.child_process import ChildProcess, RestartPolicy
from multilora.adapters.loading.fetch_server import FetchServer
from multilora.adapters.loading.loader import FetchContext, Fetched, FetchJob, failed, unavailable
from multilora.adapters.loading.messages import MAX_MESSAGE, Message, Order, StartLoader, receive, send
from multilora.adapters.loading.packers import Packers
from multilora.adapters.packing.blocks import PackTarget
from multilora.adapters.thread_pool import spare_cores
from multilora.module_command import module_command

logger = logging.getLogger(__name__)

PARALLEL_FETCHES = 4  # so that a slow download does not hold up a local directory
MAX_PACKERS = 8  # processes
WAIT_SECONDS = 20.0
"""How long a job waits for a process."""
SWITCH_SECONDS = 5e-4  # a thread that is to start reading a file waits so long for one that checks its header
NICENESS = 10  # steps have priority over adapters
# glibc's malloc: memory that a file was read into is used again, because fresh pages cost more than reading. At most
# 512 MiB stay with an idle process.
REUSE_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(512 << 20), "MALLOC_ARENA_MAX": "1"}


class ProcessLoader:
    """The engine's end. It starts the process at once, and again whenever it has died; `fileno` stays the same.

    staging: the loader owns it from now on. A restarted process gets it as soon as its predecessors and all that they
    forked are gone and no view of a part is left; until then adapters come in files. A process that keeps dying at
    its start is restarted after a pause. Jobs wait for the next process: the one that they were given to when it died
    once, as they may be why, and none longer than WAIT_SECONDS.
    """

    working = False

    def __init__(self, context: FetchContext, staging: Staging | None = None):
        self._context = context
        self._staging = staging
        self._pending: dict[int, FetchJob] = {}
        self._waiting: deque[tuple[FetchJob, float]] = deque()  # for a process, and until when
        self._tried: set[int] = set()  # versions that a process has died with
        self._to_report: list[tuple[Fetched, torch.Tensor | None]] = []  # at the next poll
        self._page_bytes = context.target.page_bytes
        self._restarts = RestartPolicy()
        self._predecessors: list[ChildProcess] = []  # ended, but something that they forked may be left
        self._has_staging = True  # the current process may write to the staging memory, if there is any
        # A socket that is never readable, for the engine to poll while there is no process. It is made now because
        # there may be no descriptor left later.
        self._silent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket = self._silent.dup()
        self._start()

    def _start(self) -> None:
        """Start a process, and connect it with its first message ready to be read. Raises OSError if that fails;
        then nothing has changed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
            ours.sendall(msgspec.msgpack.encode(self._first_message()))
            self._child = self._spawn(theirs.fileno())
            self._poll_socket(ours)

    def _first_message(self) -> StartLoader:
        context = self._context
        dtype = str(context.target.dtype).removeprefix("torch.")
        staging = self._staging.fd if self._staging is not None else None
        return StartLoader(
            context.base,
            dtype,
            self._page_bytes,
            context.target.ranks,
            context.limits,
            context.roots,
            staging,
            not self._has_staging,
            context.on_gpu,
        )

    def _spawn(self, connection: int) -> ChildProcess:
        command = module_command("multilora.adapters.loading.process", str(connection))
        fds = [connection] + ([self._staging.fd] if self._staging is not None else [])
        return ChildProcess(command, fds, REUSE_MEMORY | os.environ)

    def _poll_socket(self, connection: socket.socket) -> None:
        """Put `connection` behind the descriptor that the engine polls, whose number never changes."""
        os.dup2(connection.fileno(), self._socket.fileno(), inheritable=False)

    def submit(self, job: FetchJob) -> None:
        """See `Loader`."""
        if not self._child.ended and self._child.process.poll() is not None:
            self._to_report += self._died()
        self._start_if_due()
        if self._child.ended:
            self._waiting.append((job, monotonic() + WAIT_SECONDS))
        else:
            self._give(job)

    def _give(self, job: FetchJob) -> None:
        self._pending[job.version] = job
        try:
            send(self._socket, Order(job))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is dying; the next poll notices
        except OSError as e:  # longer than a message can be
            del self._pending[job.version]
            self._to_report.append((failed(job.version, f"{job.path[:100]}…: {e.strerror}"), None))

    def poll(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        """See `Loader`."""
        self._child.listen()
        self._start_if_due()
        self._give_waiting()
        self._grant_staging()
        done, self._to_report = self._to_report, []
        answers, at_end = self._answers()
        return done + answers + (self._died() if at_end else [])

    def _give_waiting(self) -> None:
        """Give the process what waits for one; what would wait for too long fails."""
        now = monotonic()
        while self._waiting:
            job, until = self._waiting[0]
            if not self._child.ended:
                self._give(job)
            elif now + self._restarts.seconds_left >= until:
                self._to_report.append(
                    (unavailable(job.version, f"{job.path}: {self._restarts.explanation()}"), None)
                )
            else:
                return
            self._waiting.popleft()

    def _answers(self) -> tuple[list[tuple[Fetched, torch.Tensor | None]], bool]:
        """What the process has sent, and whether it has closed its end."""
        done: list[tuple[Fetched, torch.Tensor | None]] = []
        while True:
            try:
                data, fds = receive(self._socket)
            except BlockingIOError:
                return done, False
            if not data:
                return done, True
            self._child.answered = True
            message = msgspec.msgpack.decode(data, type=Message)
            try:
                self._pending.pop(message.result.version, None)
                self._tried.discard(message.result.version)
                done.append(self._with_pages(message, fds))
            finally:
                for fd in fds:
                    os.close(fd)

    def fileno(self) -> int | None:
        """See `Loader`."""
        return self._socket.fileno()

    def close(self) -> None:
        """See `Loader`."""
        self._socket.close()  # the process ends when it notices
        self._silent.close()
        self._child.end()
        for child in (self._child, *self._predecessors):
            child.close()
        if self._staging is not None:
            self._staging.close()

    def _with_pages(self, message: Message, fds: list[int]) -> tuple[Fetched, torch.Tensor | None]:
        """The result with its packed pages, which only this process may write from now on."""
        result = message.result
        if result.kind:
            return result, None
        if message.start is not None:
            assert self._staging is not None
            pages = self._staging.view(message.start, message.nbytes, partial(self._release_part, self._child))
        elif not fds:
            return unavailable(result.version, "no file descriptor is left to receive its pages with"), None
        else:
            try:
                pages = map_file(fds[0], message.nbytes)
            except (OSError, RuntimeError) as e:
                return unavailable(result.version, f"its pages cannot be mapped: {e}"), None
        return result, pages.view(-1, self._page_bytes)

    def _release_part(self, child: ChildProcess, start: int) -> None:
        """Tell the process that a part of the staging memory may be used again. Called on any thread. A restarted
        process ignores parts that its predecessor gave out."""
        if not child.ended:
            with contextlib.suppress(OSError):  # it has died, or is closed
                self._socket.sendall(msgspec.msgpack.encode(Order(release_start=start)))

    def _grant_staging(self) -> None:
        """Give the staging memory to a restarted process, once that is safe.

        No predecessor is left that could write there. And no view of a part is left, so every `release_start` has
        been sent: none can follow this order and be taken for a part that the new process has given out.
        """
        for child in [child for child in self._predecessors if child.gone()]:
            child.close()
            self._predecessors.remove(child)
        if self._staging is None or self._has_staging or self._child.ended:
            return
        if self._predecessors or not self._staging.unused:
            return
        with contextlib.suppress(OSError):  # it is dying, or its queue is full: the next poll tries again
            self._socket.send(msgspec.msgpack.encode(Order(take_over=True)), socket.MSG_DONTWAIT)
            self._has_staging = True
            logger.info("adapters are staged again")

    def _died(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        """Start another process, at once or after a pause, and keep for it the jobs that this one had not answered.
        Those with which one has died before fail."""
        done, _ = self._answers()
        self._poll_socket(self._silent)
        self._child.end()
        self._predecessors.append(self._child)
        if self._staging is not None and self._has_staging:
            logger.warning("adapters load slower until nobody uses what the process that ended has staged")
        self._has_staging = False
        self._plan_start(self._child.describe_end(), self._child.answered)
        until = monotonic() + WAIT_SECONDS
        for version, job in self._pending.items():
            if version in self._tried:
                self._tried.discard(version)
                done.append((unavailable(version, f"{job.path}: {self._restarts.explanation()}"), None))
            else:
                self._tried.add(version)
                self._waiting.append((job, until))
        self._pending.clear()
        self._start_if_due()
        self._give_waiting()
        return done

    def _plan_start(self, how: str, useful: bool) -> None:
        pause = self._restarts.ended(how, useful)
        logger.error("the loader process %s; starting another %s", how, f"in {pause:.0f} s" if pause else "now")

    def _start_if_due(self) -> None:
        if not self._child.ended or self._restarts.seconds_left:
            return
        try:
            self._start()
        except OSError as e:
            self._plan_start(f"could not be started: {e}", useful=False)


# ---------------------------------------------------------------------- the loader's end


def serve(connection: socket.socket) -> None:
    """Answer jobs until the engine closes its end. A fetch that is still running then has its answer dropped."""
    start = msgspec.msgpack.decode(connection.recv(MAX_MESSAGE), type=StartLoader)
    target = PackTarget.of(start.base.sites, getattr(torch, start.dtype), start.page_bytes, start.ranks)
    context = FetchContext(start.base, target, start.limits, start.roots, start.on_gpu)
    cores = spare_cores(MAX_PACKERS)
    gc.collect()
    gc.freeze()  # what exists now stays; scanning it would take as long as half an adapter
    staging = mmap.mmap(start.staging, 0) if start.staging is not None else None
    packers = Packers(cores if cores > 1 else 0, connection, staging)
    buffers = SharedBuffers(staging, start.staging_in_use)
    server = FetchServer(connection, context, packers, buffers)
    threads = ThreadPoolExecutor(PARALLEL_FETCHES)
    while data := _next_order(connection):
        order = msgspec.msgpack.decode(data, type=Order)
        if order.job is not None:
            threads.submit(server.answer, order.job)
        if order.release_start is not None:
            buffers.give_back(order.release_start)
        if order.take_over:
            buffers.take_over()
    threads.shutdown(wait=False, cancel_futures=True)
    packers.close()


def _next_order(connection: socket.socket) -> bytes:
    """The next order; empty when the engine has closed its end, even with answers unread."""
    try:
        return connection.recv(MAX_MESSAGE)
    except ConnectionResetError:
        return b""


def main() -> None:
    """The loader process: serve the socket whose descriptor is the first argument."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the process group; the engine's end decides
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.suppress(OSError):  # a sandbox may not let us
        os.nice(NICENESS)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)
    logging.shutdown()
    os._exit(0)  # the interpreter would wait for a fetch that hangs


if __name__ == "__main__":
    main()
