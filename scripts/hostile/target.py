"""The server that is attacked: requests to it, its memory, and one of our own over the demo model."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil

DEADLINE = 30.0  # seconds that a hostile client waits for an answer
START_SECONDS = 300  # of a machine that many share


@dataclass(frozen=True)
class Target:
    """host, port: of the server; pid: of its front process, whose children are counted too."""

    host: str
    port: int
    pid: int

    def post(self, path: str, body: bytes, timeout: float = DEADLINE) -> int | str:
        """The status of the answer, or how the connection ended."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            return response.status
        except TimeoutError:
            return "timeout"
        except (OSError, http.client.HTTPException):
            return self._early_answer(connection)
        finally:
            connection.close()

    def _early_answer(self, connection: http.client.HTTPConnection) -> int | str:
        """A server that refuses a body before it has been sent answers and closes."""
        try:
            assert connection.sock is not None
            connection.sock.settimeout(2)
            head = connection.sock.recv(64)
            return int(head.split()[1]) if head else "closed"
        except (OSError, ValueError, IndexError, AssertionError):
            return "closed"

    def healthy(self) -> bool:
        """Whether `/health` is 200, asked on a connection of its own."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def socket(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=5)

    def rss_mib(self) -> int:
        """Resident memory of the server's processes."""
        total = 0
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += one.memory_info().rss
        return total >> 20


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def own_server(
    log: str, *flags: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> Iterator[Target]:
    """A server over the demo model on a free port. env: variables of its own; prefix: a command that starts it.
    It has a session of its own; SIGTERM to this process ends it, too."""
    before = None
    with contextlib.suppress(ValueError):  # only the main thread may say what a signal does
        before = signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    port = free_port()
    with open(log, "ab") as file:
        command = [*prefix, sys.executable, "-m", "multilora", "serve", "--port", str(port), *flags]
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=os.environ | (env or {})
        )
    target = Target("127.0.0.1", port, process.pid)
    try:
        end = time.monotonic() + START_SECONDS
        while not target.healthy():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start; see {log}")
            time.sleep(0.2)
        yield target
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
