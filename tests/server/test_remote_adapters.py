"""Adapters from a hub and from URLs, by name and by path; a host that never answers holds up nobody else."""

import asyncio
import importlib.util
import os
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run

from multilora.adapters.sources.download import Downloads, Stop
from multilora.errors import AdapterError, AdapterUnavailable
from multilora.lora_path import LoraPath

HELPER = Path(__file__).parents[1] / "adapters" / "sources" / "hub_server.py"
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "tokenizer.json": b"{}"}
IDS = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}}


@pytest.fixture(scope="module")
def hub_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_server", HELPER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(hub_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A hub on loopback with org/good and other/good, for the processes that download."""
    repositories = {
        name: {"main": FILES, "v1": FILES | {"adapter_config.json": b"{ }"}} for name in ("org/good", "other/good")
    }
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with hub_module.HubServer(repositories) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host that accepts and never answers, and is the hub, too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield url


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A web server with the adapter `good`."""
    good = tmp_path / "served" / "good"
    good.mkdir(parents=True)
    for name, data in FILES.items():
        (good / name).write_bytes(data)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def names(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_by_name_from_a_hub(hub: object) -> None:
    s = LocalServer(FakeEngineClient(), None, lora_resolver_hub="org/*")
    for name in ("org/good", "org/good@v1"):
        assert s.post("/v1/completions", {"model": name, "prompt": [5]}).status == 200
        assert s.registry.loaded()[name] == f"hf://{name}"
    assert names(s.client.loaded[1]) == sorted(FILES)
    assert Path(s.client.loaded[2], "adapter_config.json").read_bytes() == b"{ }"
    asked = len(hub.requests)
    for name in ("other/good", "good", "ORG/good", "org/../other/good", "org/good/x"):
        assert s.post("/v1/completions", {"model": name, "prompt": [5]}).status == 404
    assert len(hub.requests) == asked
    assert s.post("/v1/completions", {"model": "org/nowhere", "prompt": [5]}).status == 404
    assert len(hub.requests) > asked


def test_by_path_from_a_hub(hub: object) -> None:
    s = LocalServer(FakeEngineClient(), None)
    for name, path in {"x": "org/good", "y": "hf://org/good@v1"}.items():
        answer = s.post("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        assert (answer.status, answer.json()["loaded_adapters"][name]) == (200, path)
    assert names(s.client.loaded[1]) == sorted(FILES)
    assert "snapshots" in s.client.loaded[1]  # of the hub's cache
    answer = s.post("/load_lora_adapter", {"lora_name": "z", "lora_path": "hf://org/nowhere"})
    assert (answer.status, "no hub repository" in answer.json()["error_message"]) == (400, True)


def test_by_name_from_a_url(url: str) -> None:
    s = LocalServer(FakeEngineClient(), None, lora_resolver_url=url)
    assert s.post("/v1/completions", {"model": "good", "prompt": [5]}).status == 200
    assert s.registry.loaded() == {"good": f"{url}/good"}
    assert names(s.client.loaded[1]) == sorted(FILES)
    for name in ("nope", "%2e%2e/x", "good?x=1", "good#x"):
        assert s.post("/v1/completions", {"model": name, "prompt": [5]}).status == 404
    s.post("/unload_lora_adapter", {"lora_name": "good"})
    assert list(s.spool.root.iterdir()) == []


def test_by_path_from_a_url(url: str) -> None:
    s = LocalServer(FakeEngineClient(), None, lora_resolver_url=url)
    answer = s.post("/load_lora_adapter", {"lora_name": "x", "lora_path": f"{url}/good"})
    assert answer.json()["loaded_adapters"] == {"x": f"{url}/good"}
    assert names(s.client.loaded[1]) == sorted(FILES)
    s.post("/unload_lora_adapter", {"lora_name": "x"})
    assert list(s.spool.root.iterdir()) == []


def test_the_operator_may_name_any_url_unless_there_are_roots(url: str, tmp_path: Path) -> None:
    s = LocalServer(FakeEngineClient(), None)
    run(s.load_many([LoraPath("x", f"{url}/good")]))
    assert s.registry.loaded() == {"x": f"{url}/good"}
    s = LocalServer(FakeEngineClient(), None, lora_root=str(tmp_path))
    with pytest.raises(AdapterError, match="below no --lora-resolver-url"):
        run(s.load_many([LoraPath("x", f"{url}/good")]))


def test_a_host_that_never_answers_holds_up_nobody_else(silent: str, tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / "dir" / "local").mkdir(parents=True, exist_ok=True)
        (tmp_path / "dir" / "local" / name).write_bytes(data)
    s = LocalServer(
        FakeEngineClient(),
        None,
        lora_resolver_hub="org/*",
        lora_resolver_url=silent,
        lora_resolver_dir=str(tmp_path / "dir"),
    )

    async def work() -> float:
        hanging = [s.connect("POST", "/v1/completions", {"model": f"org/{i}", "prompt": [5]}) for i in range(4)]
        hanging += [
            s.connect("POST", "/load_lora_adapter", {"lora_name": f"x{i}", "lora_path": f"org/x{i}"})
            for i in range(4)
        ]
        while len(s.spool.downloads._running) < 8:
            await asyncio.sleep(0.01)
        start = time.monotonic()
        load = {"lora_name": "direct", "lora_path": str(tmp_path / "dir" / "local")}
        assert (await s.send("POST", "/load_lora_adapter", load)).status == 200
        assert (await s.send("POST", "/generate", IDS | {"lora_path": "local"})).status == 200
        took = time.monotonic() - start
        s.spool.downloads.close()
        ends = [(await one.answer()).status for one in hanging]
        assert ends == [503] * 8
        return took

    assert run(work()) < 60
    assert not s.spool.downloads._running


def test_a_hub_that_never_answers_holds_up_no_url(silent: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More loads hang than there are threads for them."""
    monkeypatch.setattr("multilora.adapters.sources.download.Downloads.fetch", hang_on_hubs(Downloads.fetch))
    s = LocalServer(FakeEngineClient(), None, lora_resolver_url=url)

    async def work() -> None:
        loads = [{"lora_name": f"x{i}", "lora_path": f"org/x{i}"} for i in range(20)]
        hanging = [s.connect("POST", "/load_lora_adapter", load) for load in loads]
        while len(HANGING) < 16:
            await asyncio.sleep(0.01)
        load = {"lora_name": "x", "lora_path": f"{url}/good"}
        assert (await s.send("POST", "/load_lora_adapter", load)).status == 200
        for one in hanging:
            one.hang_up()
        await asyncio.gather(*(one.task for one in hanging))
        while HANGING:  # nobody waits for them any more
            await asyncio.sleep(0.01)
        assert set(s.registry.loaded()) == {"x"} and not s.registry._loading

    run(work())


HANGING: set[Stop] = set()


def hang_on_hubs(fetch: Any) -> Any:
    def fetch_or_hang(self: Downloads, path: str, *args: Any, stop: Stop, **options: Any) -> Path:
        if "://" in path:
            return fetch(self, path, *args, stop=stop, **options)
        HANGING.add(stop)
        while not stop._stopped:
            time.sleep(0.01)
        HANGING.discard(stop)
        raise AdapterUnavailable("stopped")

    return fetch_or_hang


def test_a_load_whose_client_hangs_up_leaves_nothing(silent: str) -> None:
    s = LocalServer(FakeEngineClient(), None, lora_resolver_url=silent)

    async def work() -> None:
        load = s.connect("POST", "/load_lora_adapter", {"lora_name": "x", "lora_path": f"{silent}/x"})
        while not s.spool.downloads._running:
            await asyncio.sleep(0.01)
        load.hang_up()
        await load.task
        while s.spool.downloads._running or list(s.spool.root.iterdir()):
            await asyncio.sleep(0.01)
        assert not s.registry._versions

    run(work())


def test_a_load_has_a_deadline(silent: str) -> None:
    s = LocalServer(FakeEngineClient(), None, lora_resolver_url=silent, lora_load_timeout=1)
    answer = s.post("/load_lora_adapter", {"lora_name": "x", "lora_path": f"{silent}/x"})
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert "1 s (--lora-load-timeout)" in answer.json()["error_message"]
    assert not s.registry._versions


def test_a_fetch_has_a_deadline(silent: str, caplog: pytest.LogCaptureFixture) -> None:
    s = LocalServer(FakeEngineClient(), None, lora_resolver_url=silent, lora_load_timeout=1)
    answer = s.post("/v1/completions", {"model": "x", "prompt": [5]})
    assert answer.status == 503
    assert answer.error["message"] == "adapter 'x' cannot be fetched now; try again later"
    assert answer.headers["retry-after"] == "5"
    assert "not fetched in 1 s" in caplog.text
    assert list(s.spool.root.iterdir()) == []
