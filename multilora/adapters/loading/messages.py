"""The messages between the engine and the loader process, over a socket that keeps message boundaries.

It knows neither end. Called by `process.py`, on both ends.
"""

import contextlib
import errno
import os
import socket
from array import array
from collections.abc import Sequence

import msgspec

from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.loading.loader import Fetched, FetchJob
from multilora.adapters.peft.base_model import BaseModel

MAX_MESSAGE = 1 << 20


class StartLoader(msgspec.Struct, frozen=True):
    """The first message: a `FetchContext` in plain types.

    staging: the descriptor of the staging memory, if there is any; staging_in_use: a predecessor's parts are still in
    use, so nothing of it may be given out until an order says `take_over`.
    """

    base: BaseModel
    dtype: str
    page_bytes: int
    ranks: int
    limits: AdapterLimits
    roots: tuple[str, ...]
    staging: int | None
    staging_in_use: bool
    on_gpu: bool


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """To the loader. release_start: the part of the staging memory that begins there is not read any more; take_over:
    the staging memory that was in use at the start belongs to the loader now."""

    job: FetchJob | None = None
    release_start: int | None = None
    take_over: bool = False


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """From the loader. nbytes: the size of the pages; start: where they begin in the staging memory (None: they are
    the file whose descriptor comes along)."""

    result: Fetched
    nbytes: int = 0
    start: int | None = None


def send(connection: socket.socket, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
    """Send one message and descriptors. Raises OSError, also for a message over MAX_MESSAGE bytes."""
    data = msgspec.msgpack.encode(message)
    if len(data) > MAX_MESSAGE:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    socket.send_fds(connection, [data], fds)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the descriptors it carries; empty when the other end is closed. Raises BlockingIOError when
    there is none.

    (socket.recv_fds would do, but ignores its flags.)
    """
    data, fds = b"", array("i")
    control: list[tuple[int, int, bytes]] = []
    for _ in range(2):
        with contextlib.suppress(ConnectionResetError):  # raised once if the other end closed with messages unread
            data, control, _, _ = connection.recvmsg(MAX_MESSAGE, socket.CMSG_LEN(4), socket.MSG_DONTWAIT)
            break
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    return data, list(fds)
