"""When an adapter's files count as the same ones, and when as read from files that changed meanwhile."""

import os
import shutil
from pathlib import Path

import pytest

from multilora.adapters.sources.fingerprint import PART_BYTES, fingerprint, identity
from multilora.adapters.thread_pool import ReaderPool
from multilora.errors import AdapterInvalid, AdapterNotFound

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter whose weights' file has a part and a bit."""
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / WEIGHTS).write_bytes(b"\x02\0\0\0\0\0\0\0{}" + bytes(PART_BYTES + 64))
    return path


def test_the_fingerprint_stays_when_files_are_touched_moved_or_written_again(folder: Path, tmp_path: Path) -> None:
    before, identical = fingerprint(folder), identity(folder)
    os.utime(folder / WEIGHTS, ns=(1, 1))
    assert fingerprint(folder) == before and identity(folder) != identical
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    assert fingerprint(tmp_path / "copy") == before
    (tmp_path / "copy" / "README.md").write_text("is not read")
    assert fingerprint(tmp_path / "copy") == before


@pytest.mark.parametrize("at", [10, PART_BYTES - 1, PART_BYTES, PART_BYTES + 73])
def test_one_bit_anywhere_changes_the_fingerprint_though_size_and_time_stay(folder: Path, at: int) -> None:
    before, times = fingerprint(folder), (folder / WEIGHTS).stat()
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(at)
        file.write(b"\x01")
    os.utime(folder / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(folder) != before


def test_the_config_is_part_of_it(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "adapter_config.json").write_text('{"r": 1}')
    assert fingerprint(folder) != before


def test_parts_that_are_exchanged_change_the_fingerprint(folder: Path) -> None:
    one, other = bytes(PART_BYTES), b"\x01" * PART_BYTES
    (folder / WEIGHTS).write_bytes(one + other)
    before = fingerprint(folder)
    (folder / WEIGHTS).write_bytes(other + one)
    assert fingerprint(folder) != before


def test_threads_find_the_same_fingerprint(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(os.urandom(3 * PART_BYTES + 1))
    assert fingerprint(folder, ReaderPool(3)) == fingerprint(folder)


def test_a_file_that_was_replaced_has_another_identity_though_its_size_and_time_are_the_same(folder: Path) -> None:
    weights = folder / WEIGHTS
    before, times = identity(folder), weights.stat()
    assert identity(folder) == before
    other = folder / "incoming"
    other.write_bytes(b"\x02\0\0\0\0\0\0\0{}" + b"\x01" * (PART_BYTES + 64))
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, weights)
    now = weights.stat()
    assert (now.st_size, now.st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert identity(folder) != before


@pytest.mark.parametrize("change", ["time", "size", "config"])
def test_every_other_change_gives_another_identity(folder: Path, change: str) -> None:
    weights = folder / WEIGHTS
    before = identity(folder)
    if change == "time":
        os.utime(weights, ns=(1, 1))
    elif change == "size":
        weights.write_bytes(bytes(65))
    else:
        (folder / "adapter_config.json").write_text('{"r": 1}')
    assert identity(folder) != before


@pytest.mark.parametrize("of", [fingerprint, identity])
def test_what_is_no_file_is_refused(folder: Path, of: object) -> None:
    assert callable(of)
    with pytest.raises(AdapterNotFound, match="does not exist"):
        of(folder / "nowhere")
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")  # opening it the usual way would wait for ever
    with pytest.raises(AdapterInvalid, match=r"adapter_config.json: not a regular file"):
        of(folder)
