"""The loader as a process of its own, so that reading, checking and packing never hold the step loop's GIL.

The two ends share a Unix socket, and on a GPU the staging memory: jobs go one way, results come back with the place
of the packed pages in that memory, or with the descriptor of an anonymous memory file that holds them. A file is used
once, a place again when the engine has said that it is done with it. Nothing has a name, so nothing is left behind
when a process dies.
Run by `ProcessLoader` as `python -m multilora.adapters.loading.process`.
"""

import contextlib
import gc
import logging
import mmap
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec
import torch

from multilora.adapters.host.mapping import map_file
from multilora.adapters.host.shared_buffers import SharedBuffer, SharedBuffers
from multilora.adapters.host.staging import Staging
from multilora.adapters.loading.child_process import ChildProcess, Starts
from multilora.adapters.loading.loader import FetchContext, Fetched, FetchJob, fetch
from multilora.adapters.loading.messages import MAX_MESSAGE, Message, Order, Start, failed, receive, send
from multilora.adapters.loading.packers import Packers
from multilora.adapters.packing.blocks import PackTarget
from multilora.adapters.packing.pack_jobs import PackJob
from multilora.adapters.thread_pool import ReaderPool, spare_cores

logger = logging.getLogger(__name__)

PARALLEL_FETCHES = 4  # so that a slow download does not hold up a local directory
MAX_READERS = 8  # threads, for all fetches together
MAX_PACKERS = 8  # processes
NICENESS = 10  # a step goes before an adapter
# glibc's malloc: memory that a file was read into is used again, as fresh pages cost more than reading. At most
# 512 MiB stay with the process when nothing is to do.
REUSE_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(512 << 20), "MALLOC_ARENA_MAX": "1"}


class ProcessLoader:
    """The engine's end. Starts the process at once; starts it again if it died. `fileno` stays the same.

    staging: belongs to the loader from now on. A process that took the place of another gets it as soon as that one
    and all that it forked are gone, and nobody holds a part of it any more; until then adapters come in files.
    A process that dies at its start again and again is started after a pause, in which every job fails at once.
    """

    working = False

    def __init__(self, context: FetchContext, staging: Staging | None = None):
        self._context = context
        self._staging = staging
        self._pending: dict[int, FetchJob] = {}
        self._to_report: list[tuple[Fetched, torch.Tensor | None]] = []  # at the next poll
        self._page_bytes = context.target.page_bytes
        self._starts = Starts()
        self._before: list[ChildProcess] = []  # that have ended, but something that they forked may be left
        self._has_staging = True  # the process of now may write there, if there is staging memory
        # Never readable, as nobody can send to it: who polls it sleeps. Made now, as there may be no descriptor left
        # when it is needed.
        self._quiet = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket = self._quiet.dup()
        self._start()

    def _start(self) -> None:
        """A process, and a connection to it with its first message to read. Raises OSError if there cannot be one;
        then nothing has changed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
            ours.sendall(msgspec.msgpack.encode(self._first_message()))
            self._life = self._spawn(theirs.fileno())
            self._poll_instead(ours)

    def _first_message(self) -> Start:
        context = self._context
        dtype = str(context.target.dtype).removeprefix("torch.")
        staging = self._staging.fd if self._staging is not None else None
        return Start(
            context.base, dtype, self._page_bytes, context.limits, context.roots, staging, not self._has_staging
        )

    def _spawn(self, connection: int) -> ChildProcess:
        command = [sys.executable, "-m", "multilora.adapters.loading.process", str(connection)]
        fds = [connection] + ([self._staging.fd] if self._staging is not None else [])
        return ChildProcess(command, fds, REUSE_MEMORY | os.environ)

    def _poll_instead(self, connection: socket.socket) -> None:
        """Who polls knows our socket by its number."""
        os.dup2(connection.fileno(), self._socket.fileno(), inheritable=False)

    def submit(self, job: FetchJob) -> None:
        if not self._life.ended and self._life.process.poll() is not None:
            self._to_report += self._died()
        self._start_if_due()
        if self._life.ended:
            self._to_report.append((failed(job.version, f"{job.path}: {self._starts.trouble()}"), None))
            return
        self._pending[job.version] = job
        try:
            send(self._socket, Order(job))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is just dying: the next poll notices
        except OSError as e:  # longer than a message can be
            del self._pending[job.version]
            self._to_report.append((failed(job.version, f"{job.path[:100]}…: {e.strerror}"), None))

    def poll(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        self._life.listen()
        self._start_if_due()
        self._hand_over()
        done, self._to_report = self._to_report, []
        answers, at_end = self._answers()
        return done + answers + (self._died() if at_end else [])

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
            self._life.answered = True
            message = msgspec.msgpack.decode(data, type=Message)
            try:
                self._pending.pop(message.result.version, None)
                done.append(self._with_pages(message, fds))
            finally:
                for fd in fds:
                    os.close(fd)

    def fileno(self) -> int | None:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()  # the process ends when it notices
        self._quiet.close()
        self._life.end()
        for child_process in (self._life, *self._before):
            child_process.close()
        if self._staging is not None:
            self._staging.close()

    def _with_pages(self, message: Message, fds: list[int]) -> tuple[Fetched, torch.Tensor | None]:
        """The packed pages, which nobody else writes to."""
        result = message.result
        if result.kind:
            return result, None
        if message.start is not None:
            assert self._staging is not None
            pages = self._staging.view(message.start, message.nbytes, partial(self._done_with, self._life))
        elif not fds:
            return failed(result.version, "no file descriptor is left to receive its pages with"), None
        else:
            try:
                pages = map_file(fds[0], message.nbytes)
            except (OSError, RuntimeError) as e:
                return failed(result.version, f"its pages cannot be mapped: {e}"), None
        return result, pages.view(-1, self._page_bytes)

    def _done_with(self, child_process: ChildProcess, start: int) -> None:
        """On any thread. A process that took the place of that one takes no notice, should it hear of it."""
        if not child_process.ended:
            with contextlib.suppress(OSError):  # it has died, or is closed
                self._socket.sendall(msgspec.msgpack.encode(Order(done_with=start)))

    def _hand_over(self) -> None:
        """The staging memory, to a process that took the place of another.

        Whoever could write there is gone. And as nobody holds a part of it, everybody has already said that he is
        done with his: none of that can come after this order and be taken for a part given out since.
        """
        for child_process in [child_process for child_process in self._before if child_process.gone()]:
            child_process.close()
            self._before.remove(child_process)
        if self._staging is None or self._has_staging or self._life.ended or self._before or not self._staging.unused:
            return
        with contextlib.suppress(OSError):  # it is just dying, or has a lot to read: later, then
            self._socket.send(msgspec.msgpack.encode(Order(take_over=True)), socket.MSG_DONTWAIT)
            self._has_staging = True
            logger.info("adapters are staged again")

    def _died(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        """What the process had to do fails, save what it had answered; another starts, at once or after a pause."""
        done, _ = self._answers()
        self._poll_instead(self._quiet)
        self._life.end()
        self._before.append(self._life)
        if self._staging is not None and self._has_staging:
            logger.warning("adapters load slower until nobody uses what the process that ended has staged")
        self._has_staging = False
        self._plan_start(self._life.how(), self._life.answered)
        for version, job in self._pending.items():
            done.append((failed(version, f"{job.path}: {self._starts.trouble()}"), None))
        self._pending.clear()
        self._start_if_due()
        return done

    def _plan_start(self, how: str, useful: bool) -> None:
        pause = self._starts.ended(how, useful)
        logger.error("the loader process %s; starting another %s", how, f"in {pause:.0f} s" if pause else "now")

    def _start_if_due(self) -> None:
        if not self._life.ended or self._starts.seconds_left:
            return
        try:
            self._start()
        except OSError as e:
            self._plan_start(f"could not be started: {e}", useful=False)


# ---------------------------------------------------------------------- the loader's end


def serve(connection: socket.socket) -> None:
    """Answer jobs until the engine closes its end. A fetch may go on in its thread; its answer is lost."""
    start = msgspec.msgpack.decode(connection.recv(MAX_MESSAGE), type=Start)
    target = PackTarget(start.base.sites, getattr(torch, start.dtype), start.page_bytes)
    context = FetchContext(start.base, target, start.limits, start.roots)
    cores = spare_cores(MAX_PACKERS)
    gc.collect()
    gc.freeze()  # what is there now stays; looking through all of it would take as long as half an adapter
    staging = mmap.mmap(start.staging, 0) if start.staging is not None else None
    packers = Packers(cores if cores > 1 else 0, connection, staging)
    places = SharedBuffers(staging, start.staging_in_use)
    server = _Server(connection, context, packers, places)
    threads = ThreadPoolExecutor(PARALLEL_FETCHES)
    while data := _next_order(connection):
        order = msgspec.msgpack.decode(data, type=Order)
        if order.job is not None:
            threads.submit(server.answer, order.job)
        if order.done_with is not None:
            places.give_back(order.done_with)
        if order.take_over:
            places.take_over()
    threads.shutdown(wait=False, cancel_futures=True)
    packers.close()


def _next_order(connection: socket.socket) -> bytes:
    """Empty when the engine has closed its end, whether or not it had read everything."""
    try:
        return connection.recv(MAX_MESSAGE)
    except ConnectionResetError:
        return b""


class _Server:
    """What the fetches share."""

    def __init__(self, connection: socket.socket, context: FetchContext, packers: Packers, places: SharedBuffers):
        self._connection = connection
        self._context = context
        self._packers = packers
        self._places = places
        self._readers = ReaderPool(spare_cores(MAX_READERS), packers.memory, packers.read)
        self._sending = threading.Lock()

    def answer(self, job: FetchJob) -> None:
        """Fetch one adapter and send it."""
        taken: list[SharedBuffer] = []  # one at most

        def allocate(num_pages: int, page_bytes: int) -> torch.Tensor:
            taken.append(self._places.take(num_pages * page_bytes))
            return taken[0].tensor().view(num_pages, page_bytes)

        def write(pack_jobs: list[PackJob], dtype: torch.dtype, out: torch.Tensor) -> None:
            self._packers.write(pack_jobs, dtype, out, taken[0])

        try:
            result, buffer = fetch(job, self._context, allocate, self._readers, write)
        except Exception as e:
            logger.exception("reading adapter %s failed", job.path)
            result, buffer = failed(job.version, f"{job.path}: {e!r}"), None
        sent = self._send(job, result, taken[0] if buffer is not None else None)
        for place in taken:
            if sent and buffer is not None:
                self._places.sent(place)
            else:
                self._places.drop(place)

    def _send(self, job: FetchJob, result: Fetched, place: SharedBuffer | None) -> bool:
        """False: the engine did not get it. It gets an error instead, if it is still there."""
        message, fds = Message(result), []
        if place is not None:
            message = Message(result, place.size, place.start if place.fd is None else None)
            fds = [place.fd] if place.fd is not None else []
        try:
            with self._sending:
                send(self._connection, message, fds)
            return True
        except OSError as e:
            logger.warning("dropping adapter %s: the engine cannot be told of it: %s", job.path, e.strerror)
            error = failed(job.version, f"{job.path[:100]}: what was found cannot be told: {e.strerror}")
        with contextlib.suppress(OSError), self._sending:  # it is gone
            send(self._connection, Message(error))
        return False


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the engine's end decides
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):  # a sandbox may not let us
        os.nice(NICENESS)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)
    logging.shutdown()
    os._exit(0)  # the interpreter would wait for a fetch that hangs


if __name__ == "__main__":
    main()
