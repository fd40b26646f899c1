"""The way of packed adapters to the other ranks where copies run beside steps: through shared memory, by threads of
their own, so that no step waits behind an adapter's bytes.

    in staging memory   every rank has mapped and pinned it: rank 0 says where a rank's part lies, rank r has it
                        copied to its pages
    elsewhere           rank 0 copies a rank's part, piece by piece, into that rank's slots as they are free, and says
                        so; rank r has each piece copied to its pages, then counts its slot as free

With the last piece the adapter is there. What is copied from lives until then (`lead.py`). The slots have no name:
they are opened through rank 0's descriptor, as the staging memory is, and are a few for each rank. Knows neither
adapters nor steps. Called by `lead.py` and `follow.py`.
"""

import logging
import mmap
import os
import queue
import threading
from collections import deque
from collections.abc import Sequence

import msgspec
import torch
import zmq

from multilora.adapters.device.copier import Copier, Copy
from multilora.adapters.host.mapping import prefault_read
from multilora.adapters.host.shared_buffers import anonymous_file
from multilora.adapters.host.staging import Staging, register, unregister
from multilora.adapters.thread_pool import spare_cores
from multilora.engine.ranks.messages import RankProgress, pages_address

logger = logging.getLogger(__name__)

SLOTS = 3  # of each rank: one is filled while another is copied
SLOT_BYTES = 16 << 20  # or one page, if that is larger
CORES = 8
CHECK_SECONDS = 0.0002
IDLE_MS = 200
CLOSE_SECONDS = 10


class MapMemory(msgspec.Struct, tag=True, frozen=True):
    """Map the memory at this path and pin it, before anything in it is to be copied."""

    memory: str


class PagePiece(msgspec.Struct, tag=True, frozen=True):
    """Some pages of a rank's part of an adapter lie at byte `start` of the memory at path `memory`, one after the
    other; they go to arena pages `pages`. last: the adapter ends with them."""

    memory: str
    start: int
    pages: list[int]
    last: bool


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(MapMemory | PagePiece)


class PageRelay:
    """Rank 0's end. `send` and `close` belong to one thread."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", directory: str, progress: RankProgress):
        self._size = len(progress.pieces)
        self._progress = progress
        self._sockets = [context.socket(zmq.PUSH) for _ in range(1, self._size)]  # the thread's, once it runs
        for rank, socket in enumerate(self._sockets, 1):
            socket.set(zmq.SNDHWM, 0)
            socket.connect(pages_address(directory, rank))
        self._sent = [0] * self._size
        self._staging: Staging | None = None
        self._slots: torch.Tensor | None = None  # uint8 [ranks, SLOTS, pages of a slot, page_bytes]
        self._fd: int | None = None
        self._jobs: queue.SimpleQueue[tuple[list[int], Sequence[torch.Tensor]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def use_staging(self, staging: Staging) -> None:
        """Parts that lie there need no slot. Called before anything is sent."""
        assert self._thread is None
        self._staging = staging
        for socket in self._sockets:
            socket.send(_encoder.encode(MapMemory(staging.path)))

    @property
    def ready(self) -> bool:
        """Whether all ranks have seen to the staging memory, which is not to be pinned beside steps."""
        return self._staging is None or bool((self._progress.mapped[1:] > 0).all())

    def send(self, pages: list[int], parts: Sequence[torch.Tensor]) -> None:
        """Have rank r copy parts[r - 1], uint8 [pages, page_bytes], to these pages. The parts are kept until they
        have been sent; what lies in staging memory must stay there until it has been copied. Raises OSError if there
        is no memory for the slots."""
        if self._slots is None and self._staged(parts[0]) is None:
            self._slots = self._make_slots(parts[0].shape[1])
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="rank-pages", daemon=True)
            self._thread.start()
        self._jobs.put((pages, parts))

    def close(self) -> None:
        """Send nothing more."""
        self._closing.set()
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        for socket in self._sockets:
            socket.close(linger=0)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _make_slots(self, page_bytes: int) -> torch.Tensor:
        pages = max(1, SLOT_BYTES // page_bytes)
        nbytes = (self._size - 1) * SLOTS * pages * page_bytes
        self._fd = anonymous_file(nbytes)
        memory = mmap.mmap(self._fd, nbytes)
        return torch.frombuffer(memory, dtype=torch.uint8).view(self._size - 1, SLOTS, pages, page_bytes)

    def _work(self) -> None:
        torch.set_num_threads(spare_cores(CORES))  # of this thread
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None and not self._closing.is_set():
                self._send_all(*job)
                del job

    def _staged(self, part: torch.Tensor) -> int | None:
        """At which byte of the staging memory it lies; None: elsewhere. All parts of an adapter lie together."""
        return self._staging.offset_of(part) if self._staging is not None else None

    def _send_all(self, pages: list[int], parts: Sequence[torch.Tensor]) -> None:
        starts = [self._staged(part) for part in parts]
        if None in starts:
            self._send_pieces(pages, parts)
            return
        assert self._staging is not None
        for rank, start in enumerate(starts, 1):
            assert start is not None
            if self._wait_for_slot(rank):
                self._say(rank, PagePiece(self._staging.path, start, pages, last=True))

    def _send_pieces(self, pages: list[int], parts: Sequence[torch.Tensor]) -> None:
        """The ranks take turns, so that all of them copy at a time."""
        assert self._slots is not None
        memory, slot_bytes = f"/proc/{os.getpid()}/fd/{self._fd}", self._slots[0, 0].numel()
        each = self._slots.shape[2]
        for first in range(0, len(pages), each):
            for rank, part in enumerate(parts, 1):
                if not self._wait_for_slot(rank):
                    return
                piece = part[first : first + each]
                prefault_read(piece)
                slot = self._sent[rank] % SLOTS
                self._slots[rank - 1, slot, : len(piece)].copy_(piece)
                start, last = ((rank - 1) * SLOTS + slot) * slot_bytes, first + each >= len(pages)
                self._say(rank, PagePiece(memory, start, pages[first : first + each], last))

    def _wait_for_slot(self, rank: int) -> bool:
        """False: nothing is to be sent any more."""
        while self._sent[rank] - self._progress.pieces[rank] >= SLOTS:
            if self._closing.wait(CHECK_SECONDS):
                return False
        return True

    def _say(self, rank: int, piece: PagePiece) -> None:
        self._sent[rank] += 1
        self._sockets[rank - 1].send(_encoder.encode(piece))


class PageReceiver:
    """Another rank's end: a thread that gives what comes to `copier`, which is its own, until `close`. device: where
    the pages are."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        directory: str,
        rank: int,
        page_bytes: int,
        copier: Copier,
        progress: RankProgress,
        device: torch.device,
    ):
        self._device = device
        self._rank, self._page_bytes, self._copier, self._progress = rank, page_bytes, copier, progress
        self._socket = context.socket(zmq.PULL)
        self._socket.bind(pages_address(directory, rank))
        self._memory: dict[str, torch.Tensor] = {}  # by path, uint8
        self._pinned: list[torch.Tensor] = []
        self._copies: deque[tuple[Copy, bool]] = deque()  # in flight, and whether an adapter ends with it
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rank-pages", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Copy nothing more."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        while self._pinned and not self._copies:  # what is still copied from stays pinned
            unregister(self._pinned.pop().data_ptr())

    def _work(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread
            while not self._closing.is_set():
                self._note_copies()
                if self._socket.poll(1 if self._copies else IDLE_MS):
                    match _decoder.decode(self._socket.recv()):
                        case MapMemory(memory):
                            self._map(memory)
                            self._progress.mapped[self._rank] += 1
                        case PagePiece() as piece:
                            self._take(piece)
        except Exception as e:  # noqa: BLE001 - `check` raises it
            self._error = e
        finally:
            self._socket.close(linger=0)

    def _map(self, path: str) -> None:
        """If it cannot be pinned, copies from it take the copier's way for ordinary memory."""
        try:
            self._memory[path] = memory = _opened(path)
        except OSError as e:  # it is tried again when something in it is to be copied
            logger.warning("rank %d: adapters load slower, staging memory cannot be opened: %s", self._rank, e)
            return
        if self._device.type == "cuda":
            error = register(memory.data_ptr(), memory.nbytes)
            if error is None:
                self._pinned.append(memory)
            else:
                logger.warning("rank %d: adapters load slower, staging memory is not pinned: %s", self._rank, error)

    def _take(self, piece: PagePiece) -> None:
        if piece.memory not in self._memory:
            self._memory[piece.memory] = _opened(piece.memory)
        end = piece.start + len(piece.pages) * self._page_bytes
        pages = self._memory[piece.memory][piece.start : end].view(-1, self._page_bytes)
        self._copies.append((self._copier.start_copy(pages, piece.pages), piece.last))

    def _note_copies(self) -> None:
        while self._copies and self._copies[0][0].done():
            _, last = self._copies.popleft()
            self._progress.pieces[self._rank] += 1
            if last:
                self._progress.copies[self._rank] += 1


def _opened(path: str) -> torch.Tensor:
    """All of the memory, uint8, shared."""
    fd = os.open(path, os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8)
    finally:
        os.close(fd)
