"""Downloads, each in a process of its own, so that one that hangs can be ended: at its deadline, or when the server
stops.

`Downloads` is the caller's end; `main` is the process. The order comes as a line on stdin, the result goes to stdout.
The process ends when its stdin is closed, so it does not outlive its caller. Called by `spool.py`.
"""

import contextlib
import os
import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from multilora.adapters.sources.copying import Allowance
from multilora.adapters.sources.files import show
from multilora.adapters.sources.hub import HUB_SCHEME, HubSource
from multilora.adapters.sources.remote import fetch_url, is_url
from multilora.errors import AdapterUnavailable, MultiloraError, from_wire
from multilora.module_command import module_command


class _Order(msgspec.Struct):
    """What to fetch; `target` None: into the hub's cache."""

    path: str
    target: str | None
    extra: tuple[str, ...]
    seconds: float
    max_bytes: int | None


class _Result(msgspec.Struct):
    """The directory with the files, or the error."""

    path: str = ""
    kind: str = ""
    message: str = ""


class Stop:
    """Ends one download from another thread, also one that has not begun."""

    def __init__(self) -> None:
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def attach(self, process: "subprocess.Popen[bytes]") -> None:
        """The process that is ended, at once if it was to end before."""
        with self._lock:
            self._process = process
            if self._stopped:
                process.kill()

    def detach(self) -> None:
        """The process has ended by itself."""
        with self._lock:
            self._process = None


class Downloads:
    """The downloads that run for one server or LLM; thread-safe."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        self._lock = threading.Lock()

    def fetch(
        self, path: str, target: Path | None, *, extra: Sequence[str], allowance: Allowance, stop: Stop | None = None
    ) -> Path:
        """The directory with the files of the adapter at a URL or in a hub repository (`org/name[@revision]`, with or
        without `hf://` before it): `target`, which exists and is empty, or with None a snapshot in the hub's cache.

        Blocks until the deadline at most. Raises AdapterNotFound, AdapterIncompatible over the bytes, StorageFailed,
        AdapterUnavailable when it is stopped or late, AdapterError.
        """
        stop = stop or Stop()
        order = _Order(
            path, str(target) if target else None, tuple(extra), allowance.seconds_left, allowance.max_bytes
        )
        if order.seconds <= 0:
            raise AdapterUnavailable(f"{show(path)}: could not be fetched in time")
        process = self._start()
        stop.attach(process)
        try:
            result = _ask(process, order)
        finally:
            process.kill()
            stop.detach()
            with self._lock:
                self._running.discard(process)
            process.communicate()
        if result.kind:
            raise from_wire(result.kind, result.message)
        return Path(result.path)

    def close(self) -> None:
        """End every download; `fetch` raises AdapterUnavailable there, and from now on."""
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._closed:
                raise AdapterUnavailable("no download begins any more: the server stops")
            command = module_command("multilora.adapters.sources.download")
            try:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            except OSError as e:
                raise AdapterUnavailable(f"a download cannot be started: {e.strerror}") from e
            self._running.add(process)
            return process


def _ask(process: "subprocess.Popen[bytes]", order: _Order) -> _Result:
    """The process' result; its stdin stays open meanwhile."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.flush()
        process.wait(order.seconds)
        return msgspec.json.decode(process.stdout.read(), type=_Result)
    except subprocess.TimeoutExpired:
        raise AdapterUnavailable(
            f"{show(order.path)}: not fetched in {order.seconds:.0f} s (--lora-load-timeout)"
        ) from None
    except (OSError, msgspec.MsgspecError):
        raise AdapterUnavailable(f"{show(order.path)}: the download ended without a result") from None


# ---------------------------------------------------------------------- the process


def _fetch(order: _Order) -> Path:
    allowance = Allowance(time.monotonic() + order.seconds, order.max_bytes)
    target = Path(order.target) if order.target else None
    path = order.path.removeprefix(HUB_SCHEME)
    if not is_url(path):
        return HubSource(extra=order.extra, local_dir=target).fetch(path)
    assert target is not None
    fetch_url(path, target, order.extra, allowance)
    return target


def _end_with_caller() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def main() -> None:
    """Read the order from stdin, write the result to stdout."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no result
    line = b""
    while not line.endswith(b"\n") and (data := os.read(0, 1 << 16)):
        line += data
    order = msgspec.json.decode(line, type=_Order)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    if order.max_bytes is not None:  # of each file; a write beyond it fails
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_FSIZE, (order.max_bytes, order.max_bytes))
    try:
        result = _Result(path=str(_fetch(order)))
    except MultiloraError as e:
        result = _Result(kind=e.kind, message=e.message)
    except Exception as e:  # noqa: BLE001 - told to the caller
        result = _Result(kind="AdapterError", message=f"{show(order.path)}: {type(e).__name__}: {show(str(e))}")
    os.write(out, msgspec.json.encode(result))
    os._exit(0)


if __name__ == "__main__":
    main()
