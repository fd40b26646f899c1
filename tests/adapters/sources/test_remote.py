"""Adapters from http(s) URLs and from file systems of fsspec; which URLs and names are served at all."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from multilora.adapters.sources.copying import Allowance
from multilora.adapters.sources.remote import fetch_url, is_below, is_served
from multilora.errors import AdapterError, AdapterIncompatible, AdapterNotFound

CONFIG, WEIGHTS, INDEX = "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json"
PLAIN = {CONFIG: b"{}", WEIGHTS: b"weights"}
SHARDED = {
    CONFIG: b"{}",
    INDEX: b'{"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}',
    "one.safetensors": b"1",
    "two.safetensors": b"2",
}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        found = self.server.files.get(self.path)
        status = found if isinstance(found, int) else 404 if found is None else 200
        body = found if isinstance(found, bytes) else b""
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/adapters/plain/" + self.path.rpartition("/")[2])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """`files`: path → bytes, or a status; `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.files, server.url = {}, f"http://127.0.0.1:{server.server_address[1]}"
    for name, files in {"plain": PLAIN, "sharded": SHARDED}.items():
        server.files |= {f"/adapters/{name}/{file}": data for file, data in files.items()}
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def bucket() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for name, files in {"plain": PLAIN, "sharded": SHARDED}.items():
        for file, data in files.items():
            system.pipe(f"/bucket/{name}/{file}", data)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def fetch(url: str, target: Path, max_bytes: int | None = None, seconds: float = 60) -> dict[str, bytes]:
    target.mkdir()
    fetch_url(url, target, ("tokenizer.json",), Allowance(time.monotonic() + seconds, max_bytes))
    return {file.name: file.read_bytes() for file in target.iterdir()}


def test_over_http(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert fetch(f"{server.url}/adapters/plain", tmp_path / "1") == PLAIN
    assert fetch(f"{server.url}/adapters/plain/", tmp_path / "2") == PLAIN
    assert fetch(f"{server.url}/adapters/sharded", tmp_path / "3") == SHARDED
    server.files["/adapters/plain/tokenizer.json"] = b"t"
    assert fetch(f"{server.url}/adapters/plain", tmp_path / "4") == PLAIN | {"tokenizer.json": b"t"}


def test_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    assert fetch(f"{bucket}/plain", tmp_path / "1") == PLAIN
    assert fetch(f"{bucket}/sharded", tmp_path / "2") == SHARDED
    with pytest.raises(AdapterNotFound, match="there is no adapter_config"):
        fetch(f"{bucket}/nowhere", tmp_path / "3")
    with pytest.raises(AdapterIncompatible, match="over 5 bytes"):
        fetch(f"{bucket}/plain", tmp_path / "4", max_bytes=5)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_is_not_there(server: ThreadingHTTPServer, tmp_path: Path, status: int) -> None:
    server.files[f"/adapters/plain/{WEIGHTS}"] = status
    with pytest.raises(AdapterNotFound, match="there is no adapter_model"):
        fetch(f"{server.url}/adapters/plain", tmp_path / "1")
    server.files["/adapters/sharded/two.safetensors"] = status
    with pytest.raises(AdapterNotFound, match="named in adapter_model"):
        fetch(f"{server.url}/adapters/sharded", tmp_path / "2")


def test_a_redirect_is_not_followed(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.files |= {f"/elsewhere/{name}": 302 for name in PLAIN}
    with pytest.raises(AdapterError, match="HTTP status 302"):
        fetch(f"{server.url}/elsewhere", tmp_path / "1")


def test_errors_of_the_server_and_bounds(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    with pytest.raises(AdapterIncompatible, match="over 5 bytes"):
        fetch(f"{server.url}/adapters/plain", tmp_path / "1", max_bytes=5)
    with pytest.raises(AdapterError, match="in time"):
        fetch(f"{server.url}/adapters/plain", tmp_path / "2", seconds=-1)
    server.files[f"/adapters/plain/{CONFIG}"] = 500
    with pytest.raises(AdapterError, match="HTTP status 500"):
        fetch(f"{server.url}/adapters/plain", tmp_path / "3")
    with pytest.raises(AdapterError, match="cannot be fetched: URLError"):
        fetch("http://127.0.0.1:1/adapters", tmp_path / "4")


def test_a_shard_cannot_be_named_out_of_the_folder(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.files[f"/adapters/sharded/{INDEX}"] = b'{"weight_map": {"x": "../../one.safetensors"}}'
    with pytest.raises(AdapterError, match="file beside it"):
        fetch(f"{server.url}/adapters/sharded", tmp_path / "1")


def test_without_its_file_system_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(AdapterError, match=r"Install s3fs to access S3: pip install 'multilora\[remote\]'"):
        fetch("s3://bucket/name", tmp_path / "1")


def test_which_urls_are_served() -> None:
    for url in ("http://host/a", "https://host:8000/a/b", "s3://bucket/prefix", "gs://bucket"):
        assert is_served(url)
    for url in (
        "file:///etc",
        "ftp://host/a",
        "memory://a",
        "s3://",
        "s3://b::file:///etc",
        "http://h/?a",
        "http://[/",
    ):
        assert not is_served(url)


def test_which_names_are_below_a_prefix() -> None:
    for prefix in ("s3://bucket/lora", "s3://bucket/lora/"):
        for name in ("a", "org/a", "a@v1", "a-b_c.d=e+f"):
            assert is_below(f"s3://bucket/lora/{name}", prefix)
        for name in (
            "",
            "..",
            "../a",
            "a/../b",
            "a/",
            "/a",
            "%2e%2e/a",
            "a?b",
            "a#b",
            "a\\b",
            "ä",
            ".a",
            "a\0",
            "a b",
        ):
            assert not is_below(f"s3://bucket/lora/{name}", prefix)
        for url in ("s3://bucket/lora", "s3://bucket/lora2/a", "s3://other/lora/a", "http://bucket/lora/a"):
            assert not is_below(url, prefix)
