"""Downloads in processes of their own: the result, the errors, the deadline, and the end of the server."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from multilora.adapters.sources.copying import Allowance
from multilora.adapters.sources.download import Downloads
from multilora.errors import AdapterError, AdapterIncompatible, AdapterNotFound


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The address of a server with the adapter `good`."""
    good = tmp_path / "served" / "good"
    good.mkdir(parents=True)
    (good / "adapter_config.json").write_text("{}")
    (good / "adapter_model.safetensors").write_bytes(b"w" * 1000)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a host that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def allow(seconds: float = 60, max_bytes: int | None = None) -> Allowance:
    return Allowance(time.monotonic() + seconds, max_bytes)


def test_into_a_folder(url: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert Downloads().fetch(f"{url}/good", target, extra=(), allowance=allow()) == target
    assert sorted(os.listdir(target)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_errors_keep_their_type(url: str, tmp_path: Path) -> None:
    downloads = Downloads()
    with pytest.raises(AdapterNotFound, match="there is no adapter_config"):
        downloads.fetch(f"{url}/nowhere", tmp_path, extra=(), allowance=allow())
    with pytest.raises(AdapterIncompatible, match="over 900 bytes"):
        downloads.fetch(f"{url}/good", tmp_path, extra=(), allowance=allow(max_bytes=900))
    with pytest.raises(AdapterError, match="in time"):
        downloads.fetch(f"{url}/good", tmp_path, extra=(), allowance=allow(-1))
    assert downloads._running == set()


def test_a_host_that_never_answers_is_left_at_the_deadline(silent: str, tmp_path: Path) -> None:
    downloads, start = Downloads(), time.monotonic()
    with pytest.raises(AdapterError, match="not fetched in 2 s"):
        downloads.fetch(f"{silent}/good", tmp_path, extra=(), allowance=allow(2))
    assert time.monotonic() - start < 10
    assert downloads._running == set()


@pytest.mark.parametrize("path", ["{url}/good", "hf://org/name"])
def test_close_ends_what_runs(silent: str, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    downloads = Downloads()
    errors: list[AdapterError] = []

    def fetch() -> None:
        with pytest.raises(AdapterError) as error:
            downloads.fetch(path.format(url=silent), tmp_path, extra=(), allowance=allow())
        errors.append(error.value)

    thread = threading.Thread(target=fetch)
    thread.start()
    while not downloads._running:
        time.sleep(0.01)
    [process] = downloads._running
    downloads.close()
    thread.join(10)
    assert "without a result" in errors[0].message
    assert process.poll() is not None
    with pytest.raises(AdapterError, match="the server stops"):
        downloads.fetch(f"{silent}/good", tmp_path, extra=(), allowance=allow())


def test_the_process_does_not_outlive_its_caller(silent: str) -> None:
    command = [sys.executable, "-m", "multilora.adapters.sources.download"]
    order = f'{{"path":"{silent}/a","target":"/nowhere","extra":[],"seconds":60,"max_bytes":null}}\n'
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(order.encode())
        process.stdin.flush()
        time.sleep(0.5)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(10) == 1
