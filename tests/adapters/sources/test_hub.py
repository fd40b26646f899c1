"""The hub source, with huggingface_hub's own code, against a hub on loopback."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import constants

from multilora.adapters.sources.hub import HubSource
from multilora.errors import AdapterError, AdapterInvalid, AdapterNotFound, AdapterUnavailable

FILES = {
    "adapter_config.json": b'{"r": 1}',
    "adapter_model.safetensors": b"weights" * 1000,
    "adapter_model.bin": b"pickle",
    "optimizer.safetensors": b"not needed",
    "checkpoint-5/adapter_model.safetensors": b"not needed",
    "README.md": b"text",
}
SHARDED = {
    "adapter_config.json": b'{"r": 2}',
    "adapter_model.safetensors.index.json": b"{}",
    "adapter_model-00001-of-00002.safetensors": b"1",
    "adapter_model-00002-of-00002.safetensors": b"2",
}


def load_helper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub_server = load_helper()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator["hub_server.HubServer"]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    repositories = {
        "org/adapter": {"main": FILES, "v2": SHARDED},
        "org/empty": {"main": {"README.md": b"no adapter"}},
    }
    with hub_server.HubServer(repositories) as server:
        yield server


@pytest.fixture
def source(server: "hub_server.HubServer", tmp_path: Path) -> HubSource:
    return HubSource(server.url, tmp_path / "cache")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_fetches_only_what_is_read(source: HubSource, capfd: pytest.CaptureFixture[str]) -> None:
    folder = source.fetch("org/adapter")
    assert names(folder) == {"adapter_config.json", "adapter_model.safetensors"}
    assert (folder / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]
    assert capfd.readouterr() == ("", "")


def test_fetches_other_files_on_demand(server: "hub_server.HubServer", tmp_path: Path) -> None:
    source = HubSource(server.url, tmp_path / "cache", extra=("README.md", "not_there.json"))
    assert names(source.fetch("org/adapter")) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_revision(source: HubSource) -> None:
    assert names(source.fetch("org/adapter@v2")) == set(SHARDED)
    assert source.fetch(f"org/adapter@{hub_server.commit_of(SHARDED)}") == source.fetch("org/adapter@v2")
    assert source.fetch("org/adapter@main") == source.fetch("org/adapter") != source.fetch("org/adapter@v2")
    with pytest.raises(AdapterNotFound, match=r"'org/adapter' has no revision 'v3'"):
        source.fetch("org/adapter@v3")


def test_a_new_commit_is_noticed_and_the_old_files_stay(source: HubSource, server: "hub_server.HubServer") -> None:
    old = source.fetch("org/adapter")
    server.repositories["org/adapter"]["main"] = FILES | {"adapter_config.json": b'{"r": 9}'}
    new = source.fetch("org/adapter")
    assert (new / "adapter_config.json").read_bytes() == b'{"r": 9}'
    assert (old / "adapter_config.json").read_bytes() == b'{"r": 1}'


def test_second_fetch_downloads_nothing(source: HubSource, server: "hub_server.HubServer") -> None:
    folder = source.fetch("org/adapter")
    server.requests.clear()
    assert source.fetch("org/adapter") == folder
    assert not [path for _, path in server.requests if "/resolve/" in path]


def test_not_there(source: HubSource) -> None:
    with pytest.raises(AdapterNotFound, match=r"no hub repository 'org/nope'.*no such directory"):
        source.fetch("org/nope")
    with pytest.raises(AdapterNotFound, match=r"'org/empty' has no adapter_config.json"):
        source.fetch("org/empty")
    for path in ("name", "a/b/c", "org/name@", "org/..", "org/a@x/../y"):
        with pytest.raises(AdapterInvalid, match="org/name@revision"):
            source.fetch(path)
    with pytest.raises(AdapterInvalid, match=r"'org/a--b'.*not a valid name"):
        source.fetch("org/a--b")


def test_gated(source: HubSource, server: "hub_server.HubServer") -> None:
    server.gated.add("org/adapter")
    with pytest.raises(AdapterError, match=r"'org/adapter' is gated.*HF_TOKEN") as caught:
        source.fetch("org/adapter")
    assert type(caught.value) is AdapterError


def test_offline(source: HubSource, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = source.fetch("org/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert source.fetch("org/adapter") == cached
    for path in ("org/adapter@v2", "org/other"):
        with pytest.raises(AdapterNotFound, match="HF_HUB_OFFLINE is set"):
            source.fetch(path)


def test_connection_refused(source: HubSource, tmp_path: Path) -> None:
    cached = source.fetch("org/adapter")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    gone = HubSource(f"http://127.0.0.1:{port}", tmp_path / "cache")
    with pytest.raises(AdapterError, match=r"'org/other': the hub cannot be reached") as caught:
        gone.fetch("org/other")
    assert type(caught.value) is AdapterUnavailable
    assert gone.fetch("org/adapter") == cached  # what is complete in the cache is served, as huggingface_hub does


def test_a_download_that_breaks_leaves_no_file(
    source: HubSource, server: "hub_server.HubServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cut = True
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(AdapterError, match=r"'org/adapter'"):
        source.fetch("org/adapter")
    found = [path for path in (tmp_path / "cache").rglob("adapter_model.safetensors") if "snapshots" in path.parts]
    assert found == []
    server.cut = False
    folder = source.fetch("org/adapter")
    assert (folder / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]


def test_environment_variables(server: "hub_server.HubServer", tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are read when huggingface_hub is imported, hence other processes."""
    code = "from multilora.adapters.sources import resolve; print(resolve('org/adapter@v2'))"
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_CACHE", None)
    online = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert Path(online.stdout.strip()).is_relative_to(tmp_path)
    server.requests.clear()
    env["HF_HUB_OFFLINE"] = "1"
    offline = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert offline.stdout == online.stdout
    assert server.requests == []
