"""Device memory of each rank that all ranks of a host can write: allocated here, opened there through CUDA's
inter-process handles. Without multicast. Called by `exchange.py`.
"""

import weakref
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

from multilora.errors import ConfigError


class PeerMemory:
    """`nbytes` of zeros on each rank's device. addresses: by rank, as this rank's device sees them."""

    def __init__(self, store: c10d.Store, rank: int, size: int, nbytes: int):
        """Waits for all ranks; each has its own current device. store: where they leave their handles for each other.

        Raises ConfigError if one cannot, on all ranks alike.
        """
        own, opened = 0, dict[int, int]()
        try:
            own = _allocate(nbytes)
            store.set(f"memory-{rank}", _export(own))
        except (ImportError, RuntimeError) as e:
            store.set(f"memory-{rank}", f"!{e}")
        handles = [bytes(store.get(f"memory-{other}")) for other in range(size)]
        failures = [handle[1:].decode() for handle in handles if handle.startswith(b"!")]
        if not failures:
            try:
                opened = {other: _open(handle) for other, handle in enumerate(handles) if other != rank}
                store.set(f"opened-{rank}", "yes")
            except RuntimeError as e:
                store.set(f"opened-{rank}", f"!{e}")
            answers = [bytes(store.get(f"opened-{other}")) for other in range(size)]
            failures = [answer[1:].decode() for answer in answers if answer.startswith(b"!")]
        self._free = weakref.finalize(self, _release, own, list(opened.values()))
        if failures:
            self._free()
            raise ConfigError(f"ranks cannot write each other's memory: {failures[0]}")
        self.addresses = [own if other == rank else opened[other] for other in range(size)]


def have_atomics(store: c10d.Store, rank: int, size: int) -> bool:
    """Whether every rank's device has atomic operations on the memory of every other; the same on all of them. Rank r
    is on device r."""
    try:
        runtime = _runtime()
        kind = runtime.cudaDeviceP2PAttr.cudaDevP2PAttrNativeAtomicSupported
        others = (other for other in range(size) if other != rank)
        own = all(_checked(runtime.cudaDeviceGetP2PAttribute(kind, rank, other)) for other in others)
    except (ImportError, RuntimeError):
        own = False
    store.set(f"atomics-{rank}", "yes" if own else "no")
    return all(bytes(store.get(f"atomics-{other}")) == b"yes" for other in range(size))


def _runtime() -> Any:
    from cuda.bindings import runtime  # comes with torch's CUDA builds

    return runtime


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the CUDA runtime returned beside its error code. Raises RuntimeError."""
    code, *values = result
    if code != _runtime().cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA says {code.name}")
    return values[0] if values else None


def _allocate(nbytes: int) -> int:
    """Memory of its own, since a handle stands for a whole allocation."""
    runtime = _runtime()
    address = int(_checked(runtime.cudaMalloc(nbytes)))
    _checked(runtime.cudaMemset(address, 0, nbytes))
    torch.cuda.synchronize()
    return address


def _export(address: int) -> str:
    handle = _checked(_runtime().cudaIpcGetMemHandle(address))
    return bytes(handle.reserved).hex()


def _open(handle: bytes) -> int:
    runtime = _runtime()
    theirs = runtime.cudaIpcMemHandle_t()
    theirs.reserved = bytes.fromhex(handle.decode())
    return int(_checked(runtime.cudaIpcOpenMemHandle(theirs, runtime.cudaIpcMemLazyEnablePeerAccess)))


def _release(own: int, opened: list[int]) -> None:
    """The memory may still be open elsewhere, whose processes then keep it."""
    if not own and not opened:
        return
    runtime = _runtime()
    for address in opened:
        runtime.cudaIpcCloseMemHandle(address)
    if own:
        runtime.cudaFree(own)
