"""What everybody else notices: `/health` asked again and again, and one stream that runs all the time.

Both are measured from processes of their own, `python -m scripts.hostile.witness KIND HOST PORT PID`, until their
stdin is closed; then they print what they have found.
"""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.hostile.target import Target

PROBE_SECONDS = 0.02
FAILED_MS = 10_000.0
ROOT = Path(__file__).parents[2]
PATH = "/inference/v1/generate"  # whose streams have an event for each token, be it one without text
STREAM = {"token_ids": [5, 6, 7], "stream": True, "sampling_params": {"max_tokens": 400, "ignore_eos": True}}


@dataclass
class Found:
    """ms: of each probe, or between two pieces of a stream; failed: probes or streams; rss: MiB, the most."""

    ms: list[float] = field(default_factory=list)
    failed: int = 0
    rss: int = 0


def probe(target: Target, stop: threading.Event) -> Found:
    """Ask `/health`, each time on a new connection; one that fails counts as 10 s."""
    found = Found()
    while not stop.wait(PROBE_SECONDS):
        start = time.perf_counter()
        ok = target.healthy()
        found.failed += not ok
        found.ms.append((time.perf_counter() - start) * 1000 if ok else FAILED_MS)
        if len(found.ms) % 10 == 1:
            found.rss = max(found.rss, target.rss_mib())
    return found


def stream(target: Target, stop: threading.Event) -> Found:
    """Read one stream after another, and note the time between two pieces; a stream that fails counts as 10 s."""
    found = Found()
    while not stop.is_set():
        try:
            whole = _read_stream(target, stop, found)
        except OSError:
            whole = False
        if not whole:
            found.failed += 1
            found.ms.append(FAILED_MS)
            time.sleep(0.2)
    return found


def _read_stream(target: Target, stop: threading.Event, found: Found) -> bool:
    """Whether it came to its end, or was told to stop."""
    body = json.dumps(STREAM).encode()
    with target.socket() as one:
        one.settimeout(60)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % PATH.encode())
        one.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        last, tail = None, b""
        while not stop.is_set():
            data = one.recv(65536)
            now = time.perf_counter()
            tail = (tail + data)[-64:]
            if not data or b'"error"' in data:
                return False
            if b"[DONE]" in tail:
                return True
            if last is not None:
                found.ms.append((now - last) * 1000)
            if b"data: " in data:
                last = now
    return True


KINDS = {"probe": probe, "stream": stream}


@contextlib.contextmanager
def witness(kind: str, target: Target) -> Iterator[Found]:
    """Filled when this ends."""
    where = [kind, target.host, str(target.port), str(target.pid)]
    command = [sys.executable, "-m", "scripts.hostile.witness", *where]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    found = Found()
    try:
        yield found
    finally:
        said, _ = process.communicate()  # closes its stdin, which ends it
        found.ms, found.failed, found.rss = json.loads(said)


def percentile(ms: Sequence[float], share: float) -> float:
    """What that share of the values does not exceed."""
    ordered = sorted(ms)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def probe_percentile(ms: Sequence[float], share: float) -> float:
    """The same of probes. A slow one also stands for those that would have been sent meanwhile."""
    step = PROBE_SECONDS * 1000
    return percentile([one - k * step for one in ms for k in range(1 + int(one / step))], share)


def main(kind: str, host: str, port: str, pid: str) -> int:
    """Measure until stdin is closed, and print what was found."""
    stop, found = threading.Event(), list[Found]()
    target = Target(host, int(port), int(pid))
    thread = threading.Thread(target=lambda: found.append(KINDS[kind](target, stop)))
    thread.start()
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    sys.stdin.read()
    stop.set()
    thread.join()
    sys.stdout.write(json.dumps([found[0].ms, found[0].failed, found[0].rss]))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
