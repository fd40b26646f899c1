"""The demo's server: a process of its own with the bundled model, on a free port. Called by `command.py`."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from multilora.cli.demo.examples import DemoError, expect
from multilora.demo import adapter_paths
from multilora.module_command import module_command

START_SECONDS = 600
STOP_SECONDS = 30


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(log: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """URL and process of a running `multilora serve` with every bundled adapter and `flags`; ended in any case."""
    port = free_port()
    paths = [f"{name}={path}" for name, path in adapter_paths().items()]
    command = module_command("multilora", "serve", "--port", str(port), *flags, "--lora-paths", *paths)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_healthy(http: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    """Return when the server answers. Raises DemoError if it ends first, or takes longer than START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        expect(process.poll() is None, f"the server ended with code {process.returncode} before it was up")
        try:
            if http.get("/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise DemoError(f"the server was not up after {START_SECONDS} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server as an operator would. Raises DemoError if it doesn't end, or ends with an error."""
    process.terminate()
    try:
        code = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the server was still there {STOP_SECONDS} s after SIGTERM") from None
    expect(code == 0, f"the server ended with code {code}")
