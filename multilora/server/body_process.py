"""The process that reads large bodies, and the server's side of it.

Whatever decodes and validates a body of a million values keeps Python's interpreter for tens of milliseconds at a
time, in which no other thread serves anybody. Here another interpreter does it, and what comes back is copied: texts
at once, lists of token ids as arrays, an error as its message. It has a session of its own, so that it takes no core
from the front's process, and ends with it, as their socket is closed then.

`python -m multilora.server.body_process SOCKET LEVEL FORMAT` is the process, LEVEL and FORMAT those of its log. It
says that it is ready with an empty answer, then answers one request after another. A request is the length and the
name of the body's class, the length and the bytes of the body; an answer is a number (`_VALUE` and so on), the
length, and a pickled value, or the error's message and field. Both are of the same program and the same user;
nothing that a client has written is unpickled.
"""

import contextlib
import gc
import importlib
import logging
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

from multilora import logs
from multilora.drivers.background import stand_aside
from multilora.errors import BadRequest, MultiloraError, QueueFull
from multilora.module_command import module_command
from multilora.server.body_values import body_values, pack_ids

MODULE = "multilora.server.body_process"
logger = logging.getLogger(MODULE)  # as __name__ is "__main__" where it is run

ANSWER_SECONDS = 20.0
"""For one body, which takes far less than a second. A process that takes longer is killed."""
PICKLE_DEPTH = 8_000
"""Calls within calls while a value is pickled: what JSON's decoder lets through is nested a thousand deep."""
RESTART_SECONDS = 5.0
"""Between two starts of the process."""
_HEAD = struct.Struct("<QQ")
_VALUE, _REFUSED, _FAILED = range(3)  # what is answered
_ENDED = "the process that reads large bodies has ended; try again"


class BodyProcess:
    """The server's side, for one thread at a time. Once started, the process is started again when it has ended."""

    def __init__(self, log: tuple[str, str] = ("info", "text")):
        """log: --log-level and --log-format."""
        self._log = log
        self._socket: socket.socket | None = None
        self._end: Callable[[], object] | None = None  # ends the process, here or when this object is gone
        self._ready = False
        self._started: float | None = None  # when, the last time

    def start(self) -> None:
        """Start the process, without waiting for it. If that cannot be, a warning says so."""
        self._started = time.monotonic()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    module_command(MODULE, str(theirs.fileno()), *self._log),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            except OSError as e:
                ours.close()
                logger.warning("the process that reads large bodies does not start: %s", e)
                return
        self._socket, self._ready = ours, False
        self._end = weakref.finalize(self, _end, process, ours)

    def is_ready(self) -> bool:
        """Return whether `read` answers now, as it does a second after `start`."""
        if self._socket is None:
            if self._started is not None and time.monotonic() - self._started > RESTART_SECONDS:
                self.start()
            return False
        if not self._ready:
            self._ready = self._has_begun(self._socket)
        return self._ready

    def read(self, body: bytes, kind: type) -> Any:
        """Return `body_values(body, kind)` with long lists of token ids packed. Raises BadRequest; QueueFull if the
        process ends meanwhile, as it does where memory ends: the body is not tried here then."""
        try:
            if self._socket is None:
                raise EOFError("it was not started")
            answer, data = _ask(self._socket, f"{kind.__module__}:{kind.__qualname__}", body)
        except (OSError, EOFError) as e:  # a TimeoutError is an OSError
            logger.warning("the process that reads large bodies has ended: %s", e)
            self.close()
            raise QueueFull(_ENDED) from None
        value = pickle.loads(data)
        if answer == _VALUE:
            return value
        message, param = value
        raise BadRequest(message, param=param) if answer == _REFUSED else MultiloraError(message)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._end is not None:
            self._end()
        self._socket, self._end, self._ready = None, None, False

    def _has_begun(self, ours: socket.socket) -> bool:
        ours.setblocking(False)
        try:
            if not ours.recv(_HEAD.size):
                logger.warning("the process that reads large bodies does not start")
                self.close()
                return False
        except BlockingIOError:
            return False
        ours.settimeout(ANSWER_SECONDS)
        return True


def _end(process: "subprocess.Popen[bytes]", ours: socket.socket) -> None:
    ours.close()
    process.kill()
    process.wait()


def _ask(ours: socket.socket, name: str, body: bytes) -> tuple[int, bytearray]:
    """Raises OSError, EOFError."""
    ours.sendall(_HEAD.pack(len(name), len(body)) + name.encode())
    ours.sendall(body)
    answer, size = _HEAD.unpack(_received(ours, _HEAD.size))
    return answer, _received(ours, size)


def _received(source: socket.socket, size: int) -> bytearray:
    """Return exactly `size` bytes. Raises EOFError."""
    found = bytearray(size)
    view, have = memoryview(found), 0
    while have < size:
        count = source.recv_into(view[have:])
        if not count:
            raise EOFError("the socket is closed")
        have += count
    return found


def main(theirs: socket.socket, level: str, form: str) -> None:
    """Serve until the other end is closed."""
    logs.setup(level, role="bodies", form=form)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stand_aside()
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, EOFError):
        theirs.sendall(_HEAD.pack(_VALUE, 0))
        while True:
            name_size, size = _HEAD.unpack(_received(theirs, _HEAD.size))
            name = _received(theirs, name_size).decode()
            answer, data = _answer(name, bytes(_received(theirs, size)))
            theirs.sendall(_HEAD.pack(answer, len(data)))
            theirs.sendall(data)


def _answer(name: str, body: bytes) -> tuple[int, bytes]:
    module, _, qualified = name.partition(":")
    try:
        value = body_values(body, getattr(importlib.import_module(module), qualified))
        pack_ids(value)
        return _VALUE, _pickled(value)
    except BadRequest as e:
        return _REFUSED, pickle.dumps((e.message, e.param), 5)
    except Exception as e:  # as in the server: one request's end, not everybody's
        logger.exception("a body of %s could not be read", name)
        return _FAILED, pickle.dumps((f"internal error: {type(e).__name__}", None), 5)


def _pickled(value: Any) -> bytes:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(PICKLE_DEPTH)  # not for decoding: some Pythons would have it go as deep
    try:
        return pickle.dumps(value, 5)
    finally:
        sys.setrecursionlimit(limit)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), *sys.argv[2:])
