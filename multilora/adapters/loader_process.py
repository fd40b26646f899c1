"""The loader as a process of its own, so that reading, checking and packing never hold the step loop's GIL.

The two ends share a Unix socket: jobs go one way, results come back with the file descriptor of an anonymous memory
file that holds the packed pages. A file is used once, so two adapters never share one. The file that the next adapter
will come in is announced, so that the engine can map it ahead. Nothing has a name, so nothing is left behind when a
process dies.
Run by `ProcessLoader` as `python -m multilora.adapters.loader_process`.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.base_model import BaseModel
from multilora.adapters.blocks import PackTarget
from multilora.adapters.crew import Crew, spare_cores
from multilora.adapters.loader import FetchContext, Fetched, FetchJob, fetch
from multilora.adapters.mapping import map_file, populate
from multilora.adapters.packers import Packers
from multilora.adapters.page_files import PageFile, PageFiles
from multilora.adapters.strips import Strip

logger = logging.getLogger(__name__)

MAX_MESSAGE = 1 << 20
PARALLEL_FETCHES = 4  # so that a slow download does not hold up a local directory
MAX_READERS = 8  # threads, for all fetches together
MAX_PACKERS = 8  # processes
# glibc's malloc: memory that a file was read into is used again, as fresh pages cost more than reading. At most
# 512 MiB stay with the process when nothing is to do.
REUSE_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(512 << 20), "MALLOC_ARENA_MAX": "1"}


class _Start(msgspec.Struct, frozen=True):
    """The first message: a FetchContext in plain types."""

    base: BaseModel
    dtype: str
    page_bytes: int
    limits: AdapterLimits
    roots: tuple[str, ...]


class _Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """From the loader, with the descriptor of a file. nbytes: how much of it, from its start on."""

    nbytes: int
    result: Fetched | None = None  # None: nothing is in the file yet, the next adapter may come in it


FileId = tuple[int, int]  # device, inode


class ProcessLoader:
    """The engine's end. Starts the process at once; starts it again if it died. `fileno` stays the same."""

    working = False

    def __init__(self, context: FetchContext):
        target = context.target
        dtype = str(target.dtype).removeprefix("torch.")
        self._start = _Start(context.base, dtype, target.page_bytes, context.limits, context.roots)
        self._pending: dict[int, FetchJob] = {}
        self._lost: list[tuple[Fetched, torch.Tensor | None]] = []  # failures to report at the next poll
        self._page_bytes = target.page_bytes
        self._spare: tuple[FileId, torch.Tensor] | None = None  # mapped ahead
        self._process, self._socket = self._spawn()

    def _spawn(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
        command = [sys.executable, "-m", "multilora.adapters.loader_process", str(theirs.fileno())]
        ours.sendall(msgspec.msgpack.encode(self._start))
        environment = REUSE_MEMORY | os.environ
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=environment)
        theirs.close()
        return process, ours

    def submit(self, job: FetchJob) -> None:
        if self._process.poll() is not None:
            self._lost += self._died()
        self._pending[job.version] = job
        try:
            self._socket.sendall(msgspec.msgpack.encode(job))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is just dying: the next poll notices
        except OSError as e:  # longer than a message can be
            del self._pending[job.version]
            self._lost.append((_failed(job.version, f"{job.path[:100]}…: {e.strerror}"), None))

    def poll(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        done, self._lost = self._lost, []
        while True:
            try:
                data, fds = _receive(self._socket)
            except BlockingIOError:
                return done
            except ConnectionResetError:
                data, fds = b"", []
            if not data:
                return done + self._died()
            message = msgspec.msgpack.decode(data, type=_Message)
            try:
                if message.result is None:
                    self._map_ahead(message.nbytes, fds)
                else:
                    self._pending.pop(message.result.version, None)
                    done.append(self._with_pages(message.result, message.nbytes, fds))
            finally:
                for fd in fds:
                    os.close(fd)

    def fileno(self) -> int | None:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()  # the process ends when it notices
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:  # in the middle of a download
            self._process.kill()
            self._process.wait()

    def _map_ahead(self, nbytes: int, fds: list[int]) -> None:
        self._spare = None
        if fds and os.fstat(fds[0]).st_size == nbytes:  # else it is in use already
            with contextlib.suppress(OSError, RuntimeError):  # it will be mapped when an adapter is in it
                memory = map_file(fds[0], nbytes)
                self._spare = _file_id(fds[0]), memory
                threading.Thread(target=populate, args=(memory,), name="adapter-mapping", daemon=True).start()

    def _with_pages(self, result: Fetched, nbytes: int, fds: list[int]) -> tuple[Fetched, torch.Tensor | None]:
        """The packed pages, shared with nobody any more: the loader has closed its end."""
        if result.kind:
            return result, None
        if not fds:
            return _failed(result.version, "no file descriptor is left to receive its pages with"), None
        if self._spare is not None and self._spare[0] == _file_id(fds[0]):
            pages, self._spare = self._spare[1][:nbytes], None
        else:
            try:
                pages = map_file(fds[0], nbytes)
            except (OSError, RuntimeError) as e:
                return _failed(result.version, f"its pages cannot be mapped: {e}"), None
        return result, pages.view(-1, self._page_bytes)

    def _died(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        failed = [_failed(v, f"{job.path}: the loader process ended; try again") for v, job in self._pending.items()]
        logger.error("the loader process ended with code %s; starting another", self._process.wait())
        self._pending.clear()
        self._spare = None
        self._process, ours = self._spawn()
        with ours:
            os.dup2(ours.fileno(), self._socket.fileno(), inheritable=False)  # who polls it knows it by its number
        return [(f, None) for f in failed]


def _failed(version: int, message: str) -> Fetched:
    return Fetched(version=version, kind="AdapterError", message=message)


def _file_id(fd: int) -> FileId:
    """No other file has it for as long as this one is open or mapped."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the descriptors it carries. Raises BlockingIOError when there is none.

    (socket.recv_fds would do, but ignores its flags.)
    """
    data, control, _, _ = connection.recvmsg(MAX_MESSAGE, socket.CMSG_LEN(4), socket.MSG_DONTWAIT)
    fds = array("i")
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    return data, list(fds)


# ---------------------------------------------------------------------- the loader's end


def serve(connection: socket.socket) -> None:
    """Answer jobs until the engine closes its end."""
    start = msgspec.msgpack.decode(connection.recv(MAX_MESSAGE), type=_Start)
    target = PackTarget(start.base.sites, getattr(torch, start.dtype), start.page_bytes)
    context = FetchContext(start.base, target, start.limits, start.roots)
    cores = spare_cores(MAX_PACKERS)
    packers = Packers(cores if cores > 1 else 0, connection)
    server = _Server(connection, context, packers)
    with ThreadPoolExecutor(PARALLEL_FETCHES) as threads:
        while data := _next_job(connection):
            threads.submit(server.answer, msgspec.msgpack.decode(data, type=FetchJob))
        threads.shutdown(wait=False, cancel_futures=True)
    packers.close()


def _next_job(connection: socket.socket) -> bytes:
    """Empty when the engine has closed its end, whether or not it had read everything."""
    try:
        return connection.recv(MAX_MESSAGE)
    except ConnectionResetError:
        return b""


class _Server:
    """What the fetches share."""

    def __init__(self, connection: socket.socket, context: FetchContext, packers: Packers):
        self._connection = connection
        self._context = context
        self._packers = packers
        self._crew = Crew(spare_cores(MAX_READERS), packers.memory)
        self._files = PageFiles()
        self._sending = threading.Lock()

    def answer(self, job: FetchJob) -> None:
        """Fetch one adapter and send it; then make memory ready for another one like it."""
        files: list[PageFile] = []

        def allocate(num_pages: int, page_bytes: int) -> torch.Tensor:
            size = num_pages * page_bytes
            files.append(self._files.take(size))
            return torch.frombuffer(files[0].memory, dtype=torch.uint8, count=size).view(num_pages, page_bytes)

        def write(strips: list[Strip], dtype: torch.dtype, out: torch.Tensor) -> None:
            self._packers.write(strips, dtype, out, files[0].fd)

        try:
            result, buffer = fetch(job, self._context, allocate, self._crew, write)
        except Exception as e:
            logger.exception("reading adapter %s failed", job.path)
            result, buffer = Fetched(version=job.version, kind="AdapterInvalid", message=f"{job.path}: {e!r}"), None
        nbytes = buffer.numel() if buffer is not None else 0
        try:
            self._send(_Message(nbytes, result), files if nbytes else [])
        except OSError:
            logger.warning("the engine is gone; dropping adapter %s", job.path)
        finally:
            for file in files:
                file.shrink(nbytes)
                file.close()
        if nbytes:
            self._files.prepare(nbytes, self._announce)

    def _announce(self, spare: PageFile) -> None:
        with contextlib.suppress(OSError):  # the engine is gone
            self._send(_Message(len(spare.memory)), [spare])

    def _send(self, message: _Message, files: list[PageFile]) -> None:
        with self._sending:
            socket.send_fds(self._connection, [msgspec.msgpack.encode(message)], [file.fd for file in files])


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the engine's end decides
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
