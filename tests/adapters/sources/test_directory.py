"""Which source a path goes to, and that nothing outside --lora-root is ever handed on.

Covers `sources/base.py` too.
"""

import os
from pathlib import Path

import pytest

from multilora.adapters.sources import DirectorySource, resolve
from multilora.errors import AdapterError, AdapterForbidden, AdapterInvalid, AdapterNotFound


class FakeHub:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def fetch(self, path: str) -> Path:
        self.asked.append(path)
        return Path("/snapshot")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("root/good", "outside", "root2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"")
    return tmp_path / "root"


def test_without_roots_any_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    for path in (str(root / "good"), "good", "./good", "../root/good", "~/good", f"{root}/../root/good/"):
        assert resolve(path) == root / "good"


def test_inside_a_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (root / "link").symlink_to(root / "good")
    roots = (str(root.parent / "nowhere"), str(root))
    for path in (str(root / "good"), "good", str(root / "link"), f"{root}/../root/./good"):
        assert resolve(path, roots) == root / "good"
    linked_root = root.parent / "linked"
    linked_root.symlink_to(root)
    assert resolve(str(linked_root / "good"), (str(linked_root),)) == root / "good"


def test_outside_every_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    outside = root.parent / "outside"
    (root / "link").symlink_to(outside)
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    absolute = [str(outside), f"{root}/../outside", f"{root}/link", f"{root}/up/outside", f"{root}2", "/"]
    missing = [str(outside / "missing"), f"{root}/../missing"]
    for path in (*absolute, "../outside", "link", *missing):
        with pytest.raises(AdapterForbidden) as caught:
            resolve(path, (str(root),))
        assert "outside every --lora-root" in caught.value.message
    with pytest.raises(AdapterError):
        resolve(f"{root}/loop", (str(root),))


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model-00001.safetensors"]
)
def test_a_file_that_leads_outside(name: str, root: Path) -> None:
    path = root / "good" / name
    path.unlink(missing_ok=True)
    path.symlink_to(root.parent / "outside" / "adapter_config.json")
    with pytest.raises(AdapterForbidden, match=name):
        resolve(str(root / "good"), (str(root),))
    assert resolve(str(root / "good")) == root / "good"
    path.unlink()
    path.symlink_to(root / "blob")  # inside, as in a hub cache below the root
    assert resolve(str(root / "good"), (str(root),)) == root / "good"


def test_missing_and_malformed(root: Path) -> None:
    with pytest.raises(AdapterNotFound, match=r"nowhere.*does not exist"):
        resolve(str(root / "nowhere"))
    with pytest.raises(AdapterNotFound, match=r"not a directory"):
        DirectorySource().fetch(str(root / "good" / "adapter_config.json"))
    with pytest.raises(AdapterNotFound, match=r"does not exist"):
        resolve("/" + "x" * 5000)
    for path in ("a\0b", "/a\0b", "\ud800/x", "/\ud800"):
        with pytest.raises(AdapterInvalid, match="not a path"):
            resolve(path)
    for path in ("", "name", "a/b/c", "a b/c", "a/b@", "a/..", "-a/b", "a/b@../../x", "org/name@v1@v2"):
        with pytest.raises(AdapterNotFound, match=r"no such directory, and not a hub repository"):
            resolve(path)


def test_hub_ids(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    hub = FakeHub()
    for path in ("org/name", "org/name@v1.0", "org/name@refs/pr/1", "o-r.g/na_me-2"):
        assert resolve(path, hub=hub) == Path("/snapshot")
    assert hub.asked == ["org/name", "org/name@v1.0", "org/name@refs/pr/1", "o-r.g/na_me-2"]
    os.makedirs("org/name")
    assert resolve("org/name", hub=hub) == root / "org" / "name"
    with pytest.raises(AdapterForbidden, match=r"org/other.*hub repositories are not served while --lora-root"):
        resolve("org/other", (str(root),), hub=hub)
    assert len(hub.asked) == 4
