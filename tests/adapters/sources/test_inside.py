"""Adapters copied from below a directory that clients may name: no name and no link leads out of it.

Covers `sources/copying.py` too.
"""

import errno
import logging
import os
import time
from pathlib import Path

import pytest

from multilora.adapters.sources import inside
from multilora.adapters.sources.copying import Allowance
from multilora.adapters.sources.inside import copy_adapter, is_name
from multilora.errors import AdapterError, AdapterIncompatible

SECRET = b"secret"


def make(directory: Path, weights: bytes = b"weights") -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with good, group/nested and a plain file; beside it `outside`, an adapter that must not be reached."""
    root = tmp_path / "root"
    make(root / "good")
    make(root / "group" / "nested")
    (root / "file").write_text("x")
    make(tmp_path / "outside", SECRET)
    return root


def copy(root: Path, name: str, seconds: float = 60.0, max_bytes: int | None = None) -> dict[str, bytes] | None:
    """The files that were copied; None: there is no such adapter."""
    target = root.parent / f"target-{len(list(root.parent.iterdir()))}"
    target.mkdir()
    allowance = Allowance(time.monotonic() + seconds, max_bytes)
    found = copy_adapter(str(root), name, target, extra=("tokenizer.json",), allowance=allowance)
    assert SECRET not in [file.read_bytes() for file in target.iterdir()]
    return {file.name: file.read_bytes() for file in target.iterdir()} if found else None


def test_what_is_inside_is_copied(root: Path) -> None:
    plain = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    assert copy(root, "good") == plain
    assert copy(root, "group/nested") == plain
    (root / "good" / "tokenizer.json").write_text("t")
    (root / "good" / "optimizer.pt").write_text("not an adapter's")
    assert copy(root, "good") == plain | {"tokenizer.json": b"t"}
    link = root.parent / "link"
    link.symlink_to(root)
    assert copy(link, "good") == copy(root, "good")


ESCAPES = [
    "..",
    "../outside",
    "good/../../outside",
    "good/..",
    "group/../good",
    "./good",
    "good/.",
    "",
    "/",
    "good/",
    "//good",
    "group//nested",
    "/etc",
    "{outside}",
    "good\0",
    "good\0/../../outside",
    "\ud800",
    "x" * 256,
    "x" * 100_000,
    "a/" * 3000 + "b",
    "%2e%2e/outside",
    "..%2foutside",
    "%2e%2e%2foutside",
    "..\\outside",
    "\uff0e\uff0e/outside",
    "\u2024\u2024/outside",
    "..\u2215outside",
    "..\u200b/outside",
    "~",
    "~root",
    ".hidden",
    "good/.hidden",
    "file",
    "good/adapter_config.json",
    "nowhere",
]


@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: ascii(name[:40]))
def test_no_name_leads_out(root: Path, name: str) -> None:
    make(root / ".hidden")
    make(root / "good" / ".hidden")
    assert copy(root, name.replace("{outside}", str(root.parent / "outside"))) is None


def test_which_texts_are_names() -> None:
    assert all(map(is_name, ["a", "a/b", "a..b", "a.", "org/name@v1", "ä", "a b"]))
    assert not any(map(is_name, ["", "/", "a/", "/a", "a//b", "..", "a/..", ".a", "a\0b", "\ud800"]))


def test_links_out_of_the_directory_are_refused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outside = root.parent / "outside"
    (root / "link").symlink_to(outside)
    (root / "relative").symlink_to("../outside")
    (root / "up").symlink_to("..")
    (root / "self").symlink_to(".")
    (root / "loop").symlink_to("loop")
    for name in ("link", "relative", "up/outside", "self", "loop", "group/../link"):
        assert copy(root, name) is None
    make(root / "weights_outside").joinpath("adapter_model.safetensors").unlink()
    (root / "weights_outside" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    assert copy(root, "weights_outside") is None
    (root / "prefix-of-root").symlink_to(make(root.parent / "root-sibling", SECRET))
    assert copy(root, "prefix-of-root") is None
    assert "outside the directory" in caplog.text


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "latest").symlink_to("good")
    (root / "group" / "absolute").symlink_to(root / "good")
    assert copy(root, "latest") == copy(root, "group/absolute") == copy(root, "good")
    make(root / "shared").joinpath("adapter_model.safetensors").unlink()
    (root / "shared" / "adapter_model.safetensors").symlink_to("../good/adapter_model.safetensors")
    assert copy(root, "shared") == copy(root, "good")


def _swap(path: Path, to: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to(to)


@pytest.mark.parametrize("part", ["group", "group/nested"])
def test_a_directory_swapped_for_a_link_after_the_check(
    root: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(root.parent / "outside" / "nested", SECRET)
    check = inside._parts_below

    def check_and_swap(*args: Path) -> tuple[str, ...]:
        parts = check(*args)
        _swap(root / part, root.parent / "outside")
        return parts

    monkeypatch.setattr(inside, "_parts_below", check_and_swap)
    assert copy(root, "group/nested") is None


def test_a_directory_swapped_for_a_link_once_it_is_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listdir = os.listdir

    def list_and_swap(directory: int | Path) -> list[str]:
        names = listdir(directory)
        if not isinstance(directory, int):
            return names
        monkeypatch.setattr(os, "listdir", listdir)
        _swap(root / "good", root.parent / "outside")
        return names

    before = copy(root, "good")
    monkeypatch.setattr(os, "listdir", list_and_swap)
    assert copy(root, "good") == before  # the old files, all of them


def test_a_file_swapped_for_a_link_after_the_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = root / "good" / "adapter_model.safetensors"
    weights.rename(root / "good" / "real.safetensors")
    weights.symlink_to("real.safetensors")
    check = inside._parts_below

    def check_and_swap(base: Path, real: Path) -> tuple[str, ...]:
        parts = check(base, real)
        if real.name == "real.safetensors":
            _swap(real, root.parent / "outside" / "adapter_model.safetensors")
        return parts

    monkeypatch.setattr(inside, "_parts_below", check_and_swap)
    assert copy(root, "good") is None


def test_what_is_no_regular_file_is_refused(root: Path) -> None:
    weights = root / "good" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert copy(root, "good") is None
    weights.unlink()
    weights.mkdir()
    assert copy(root, "good") is None


def test_a_directory_without_a_config_is_no_adapter(root: Path) -> None:
    (root / "good" / "adapter_config.json").unlink()
    assert copy(root, "good") is None


def test_bounds(root: Path) -> None:
    assert copy(root, "good", max_bytes=9) == copy(root, "good")
    with pytest.raises(AdapterIncompatible, match="over 8 bytes"):
        copy(root, "good", max_bytes=8)
    with pytest.raises(AdapterError, match="in time"):
        copy(root, "good", seconds=-1)


def test_a_full_disk_is_an_error_and_not_a_miss(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(AdapterError, match="No space left"):
        copy(root, "good")
