"""The loader process' own end: every job is answered once, and every buffer for pages is sent or free again.

Covers `loading/messages.py` too.
"""

import mmap
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fakes.tiers import BASE, PAGE_BYTES, TARGET

from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.host.shared_buffers import SharedBuffers
from multilora.adapters.loading import fetch_server as module
from multilora.adapters.loading.loader import FetchContext, Fetched, FetchJob
from multilora.adapters.loading.messages import Message, receive
from multilora.adapters.loading.packers import Packers

CONTEXT = FetchContext(BASE, TARGET, AdapterLimits())
STAGING = 64 * PAGE_BYTES


class Ends:
    """The loader's end in this process, over `fetch` as a test wants it, and the other end of its socket."""

    def __init__(self) -> None:
        self.buffers = SharedBuffers(mmap.mmap(-1, STAGING))
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = module.FetchServer(self._theirs, CONTEXT, Packers(0), self.buffers)

    def answer(self, path: str = "a") -> Fetched | None:
        """What the engine hears, if anything."""
        self._server.answer(FetchJob(1, path))
        try:
            data, fds = receive(self._ours)
        except BlockingIOError:
            return None
        assert fds == []
        return msgspec.msgpack.decode(data, type=Message).result

    def hang_up(self) -> None:
        self._ours.close()

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def all_is_free(self) -> bool:
        self.buffers._zeroing.submit(lambda: None).result()
        return self.buffers._parts.take(STAGING) == 0


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def test_an_error_of_our_own_is_not_the_adapters_fault(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: FetchJob, context: FetchContext, allocate: Any, *others: Any) -> Any:
        allocate(2, PAGE_BYTES).fill_(9)
        raise RuntimeError("no thread is left")

    monkeypatch.setattr(module, "fetch", broken)
    result = ends.answer()
    assert result.kind == "AdapterUnavailable" and "no thread is left" in result.message
    assert ends.all_is_free()


@pytest.mark.parametrize("error", ["", "AdapterInvalid"])
def test_an_answer_too_long_for_a_message_is_an_error(
    ends: Ends, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the load would never end, and its part of the staging memory would be lost."""

    def long(job: FetchJob, context: FetchContext, allocate: Any, *others: Any) -> Any:
        buffer = allocate(2, PAGE_BYTES)
        return Fetched(version=1, fingerprint="x" * (3 << 19), kind=error), None if error else buffer

    monkeypatch.setattr(module, "fetch", long)
    result = ends.answer("a" * (1 << 20))
    assert result.kind == "AdapterError" and "Message too long" in result.message
    assert ends.all_is_free()


def test_when_the_engine_is_gone_nothing_is_kept(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def good(job: FetchJob, context: FetchContext, allocate: Any, *others: Any) -> Any:
        return Fetched(version=1), allocate(2, PAGE_BYTES)

    monkeypatch.setattr(module, "fetch", good)
    ends.hang_up()
    ends._server.answer(FetchJob(1, "a"))
    assert ends.all_is_free()
