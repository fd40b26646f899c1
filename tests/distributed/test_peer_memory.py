"""Memory that ranks open for each other, over a CUDA runtime of our own making; `tests/engine/ranks/test_gpu.py` has
the real one."""

import threading
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d as c10d

from multilora.distributed import peer_memory
from multilora.distributed.peer_memory import PeerMemory, have_atomics
from multilora.errors import ConfigError


class Code(Enum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorPeerAccessUnsupported = 217  # noqa: N815


class Handle:
    reserved = b""


class Runtime:
    """What is asked of the CUDA runtime. Every thread is a process with a device."""

    cudaError_t = Code  # noqa: N815
    cudaIpcMemHandle_t = Handle  # noqa: N815
    cudaIpcMemLazyEnablePeerAccess = 1  # noqa: N815

    def __init__(self, fails: str = ""):
        self._fails = fails
        self.open: set[int] = set()
        self.closed: set[int] = set()

    def _result(self, what: str, *values: Any) -> tuple[Any, ...]:
        rank_one = threading.current_thread().name == "1"
        return (
            Code.cudaErrorPeerAccessUnsupported if what == self._fails and rank_one else Code.cudaSuccess,
            *values,
        )

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:  # noqa: N802
        address = nbytes * (1 + int(threading.current_thread().name))
        self.open.add(address)
        return self._result("malloc", address)

    def cudaMemset(self, address: int, value: int, nbytes: int) -> tuple[Any, ...]:  # noqa: N802
        assert address in self.open and value == 0 and nbytes
        return self._result("memset")

    def cudaIpcGetMemHandle(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        handle = Handle()
        handle.reserved = address.to_bytes(64, "big")
        return self._result("export", handle)

    def cudaIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags == self.cudaIpcMemLazyEnablePeerAccess
        return self._result("open", int.from_bytes(handle.reserved, "big") + 1)

    def cudaIpcCloseMemHandle(self, address: int) -> None:  # noqa: N802
        self.closed.add(address)

    def cudaFree(self, address: int) -> None:  # noqa: N802
        self.open.remove(address)

    class cudaDeviceP2PAttr:  # noqa: N801
        cudaDevP2PAttrNativeAtomicSupported = 2  # noqa: N815

    def cudaDeviceGetP2PAttribute(self, kind: int, source: int, target: int) -> tuple[Any, ...]:  # noqa: N802
        assert kind == 2 and source == int(threading.current_thread().name) != target
        return self._result("ask", int(self._fails != "atomics" or source != 1))


def meet(path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[PeerMemory | ConfigError]:
    """The memory of two ranks, or what they raise."""
    monkeypatch.setattr(peer_memory, "_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found: dict[int, PeerMemory | ConfigError] = {}

    def run(rank: int) -> None:
        store = c10d.FileStore(str(path / "meeting"), 2)
        try:
            found[rank] = PeerMemory(store, rank, 2, 1000)
        except ConfigError as e:
            found[rank] = e

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    return [found[0], found[1]]


@pytest.mark.parametrize(("fails", "expected"), [("", True), ("atomics", False), ("ask", False)])
def test_ranks_agree_whether_they_have_atomics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, expected: bool
) -> None:
    runtime, found = Runtime(fails), {}
    monkeypatch.setattr(peer_memory, "_runtime", lambda: runtime)

    def run(rank: int) -> None:
        found[rank] = have_atomics(c10d.FileStore(str(tmp_path / "meeting"), 2), rank, 2)

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert found == {0: expected, 1: expected}


def test_each_rank_sees_its_own_memory_and_that_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime()
    found = meet(tmp_path, runtime, monkeypatch)
    assert [memory.addresses for memory in found if isinstance(memory, PeerMemory)] == [[1000, 2001], [1001, 2000]]
    assert runtime.open == {1000, 2000} and not runtime.closed
    found.clear()
    assert not runtime.open and runtime.closed == {1001, 2001}, "freed with the object"


@pytest.mark.parametrize("fails", ["malloc", "memset", "export", "open"])
def test_where_one_rank_cannot_none_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    errors = meet(tmp_path, Runtime(fails), monkeypatch)
    message = "ranks cannot write each other's memory: CUDA says cudaErrorPeerAccessUnsupported"
    assert [str(error) for error in errors] == [message, message]
