"""The server that is soaked: its processes, their memory and descriptors, its files, and its memory equation."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_SECONDS = 300
STOP_SECONDS = 120
ROLES = {
    "engine": "multilora.engine.process.worker",
    "loader": "multilora.adapters.loading.process",
    "front": "multilora.server.workers.worker",
}


@dataclass(frozen=True)
class Server:
    """A running `multilora serve`. scratch: its TMPDIR."""

    url: str
    process: psutil.Process
    scratch: Path

    def pid_of(self, role: str) -> int | None:
        """The process of that role, while there is one."""
        with contextlib.suppress(psutil.Error):
            for child in self.process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if ROLES[role] in child.cmdline():
                        return child.pid
        return None

    def kill(self, role: str, number: signal.Signals = signal.SIGKILL) -> bool:
        """End that process with SIGKILL, or send another signal. Whether there was one."""
        pid = self.pid_of(role)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pid is not None

    def front_mib(self) -> float:
        return self.process.memory_info().rss / (1 << 20)

    def descriptors(self) -> int:
        """Open ones of the front, but for connections, which are clients'."""
        return self.process.num_fds() - len(self.process.net_connections("tcp"))

    def files(self) -> set[str]:
        """What the server has in its temporary folder. Names that are drawn anew at each start count as one."""
        found = (path.relative_to(self.scratch).as_posix() for path in self.scratch.rglob("*"))
        return {re.sub(r"[-_.][0-9a-z_]{6,}", "-…", name) for name in found}

    def pages(self, http: httpx.Client) -> dict[str, float]:
        """Pages of the arena by use, and `total`."""
        text = http.get("/metrics").text
        found = {use: float(n) for use, n in re.findall(r'^multilora:pages\{use="(\w+)"\} (\S+)$', text, re.M)}
        [total] = re.findall(r"^sglang:num_pages\{.*\} (\S+)$", text, re.M)
        return found | {"total": float(total)}


@contextlib.contextmanager
def started(scratch: Path, log: Path, *flags: str) -> Iterator[Server]:
    """A server over the demo model. At the end SIGTERM: raises AssertionError if it does not stop with code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "multilora", "serve", "--device", "cpu", "--port", str(port), *flags]
    with log.open("wb") as file:
        torch_cache = str(
            scratch.parent / "torch"
        )  # it makes a folder for compiled code, which is not ours to remove
        environment = os.environ | {"TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": torch_cache}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid), scratch)
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(server.url):
            assert process.poll() is None and time.monotonic() < end, f"the server did not start: {log.read_text()}"
            time.sleep(0.2)
        yield server
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
        assert code == 0, f"the server ended with code {code}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    return False
