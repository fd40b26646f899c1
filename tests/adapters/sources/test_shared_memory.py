"""Tensors in shared memory: what arrives in the file, and what must not be read."""

import os
import secrets
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from multilora.adapters.sources import shared_memory
from multilora.adapters.sources.shared_memory import SharedTensor, write_shared
from multilora.errors import BadRequest


@pytest.fixture
def segment() -> Iterator[SharedMemory]:
    memory = SharedMemory(create=True, size=4096)
    memory.buf[:4096] = bytes(range(256)) * 16
    yield memory
    memory.close()
    memory.unlink()


@pytest.fixture
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm: a directory in which a test may lay out what it likes."""
    monkeypatch.setattr(shared_memory, "ROOT", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    (tmp_path / "shm" / "good").write_bytes(bytes(64))
    (tmp_path / "outside").write_bytes(bytes(64))
    return tmp_path / "shm"


def tensor(segment: str, **changes: Any) -> SharedTensor:
    return SharedTensor(**{"name": "w", "dtype": "F32", "shape": (4,), "segment": segment, "offset": 0} | changes)


def refused(tensors: list[SharedTensor], path: Path) -> str:
    with pytest.raises(BadRequest) as error:
        write_shared(tensors, path / "x.safetensors")
    assert error.value.param == "tensors"
    assert not (path / "x.safetensors").exists()
    return error.value.message


def test_the_file_has_the_tensors(segment: SharedMemory, tmp_path: Path) -> None:
    tensors = [
        tensor(segment.name, name="a", dtype="bfloat16", shape=(3, 5), offset=512),
        tensor(f"/{segment.name}", name="b", shape=(2, 2), offset=16),
        tensor(f"/dev/shm/{segment.name}", name="c", dtype="float16", shape=()),
        tensor(segment.name, name="empty", shape=(0, 7), offset=4096),
        tensor(segment.name, name='"quoted" \u00e4', shape=(1,), offset=4092),
    ]
    path = tmp_path / "x.safetensors"
    write_shared(tensors, path)
    segment.buf[:4096] = bytes(4096)  # what has been copied is copied
    data = bytes(range(256)) * 16
    found = load_file(path)
    assert set(found) == {one.name for one in tensors}
    for one in tensors:
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}[one.dtype]
        raw = torch.frombuffer(bytearray(data[one.offset : one.offset + one.nbytes] or b"\0"), dtype=torch.uint8)
        assert found[one.name].dtype == dtype and found[one.name].shape == one.shape
        assert torch.equal(found[one.name].reshape(-1).view(torch.uint8), raw[: one.nbytes])


def test_bounds(segment: SharedMemory, tmp_path: Path) -> None:
    size = os.stat(f"/dev/shm/{segment.name}").st_size
    assert "are outside the segment" in refused([tensor(segment.name, offset=size - 15)], tmp_path)
    assert "are outside the segment" in refused([tensor(segment.name, shape=(1 << 40, 1 << 40))], tmp_path)
    write_shared([tensor(segment.name, offset=size - 16)], tmp_path / "fits.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "int64"}, "dtype 'int64': one of F32"),
        ({"offset": -4}, "must not be negative"),
        ({"shape": (-1,)}, "must not be negative"),
    ],
)
def test_bad_numbers(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        tensor("x", **changes)


def test_overlapping_tensors_cannot_make_a_file_longer_than_the_memory(own_root: Path, tmp_path: Path) -> None:
    several = [tensor("good", name=str(i), shape=(16,)) for i in range(2)]
    assert "overlap" in refused(several, tmp_path)
    write_shared(several[:1], tmp_path / "one.safetensors")


@pytest.mark.parametrize("name", ["", ".", "..", "../outside", "/../outside", "a/b", "/etc/passwd", "x\0y", "\ud800"])
def test_a_name_never_leaves_the_directory(own_root: Path, tmp_path: Path, name: str) -> None:
    assert "segment" in refused([tensor(name)], tmp_path)


def test_what_is_no_segment(own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_root / "link").symlink_to(tmp_path / "outside")
    (own_root / "directory").mkdir()
    os.mkfifo(own_root / "pipe")
    assert "is a symbolic link" in refused([tensor("link")], tmp_path)
    assert "not a regular file" in refused([tensor("directory")], tmp_path)
    assert "not a regular file" in refused([tensor("pipe")], tmp_path)
    assert "does not exist" in refused([tensor(secrets.token_hex(8))], tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "belongs to another user" in refused([tensor("good")], tmp_path)


def test_names(own_root: Path, tmp_path: Path) -> None:
    assert "list is empty" in refused([], tmp_path)
    assert "given twice" in refused([tensor("good", shape=()), tensor("good", shape=())], tmp_path)
    assert "reserved" in refused([tensor("good", name="__metadata__")], tmp_path)


def test_a_segment_that_shrinks_meanwhile_is_an_error(own_root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    header = shared_memory._header

    def shrink(tensors: Any) -> bytes:
        os.truncate(own_root / "good", 3)
        return header(tensors)

    monkeypatch.setattr(shared_memory, "_header", shrink)
    with pytest.raises(BadRequest, match="has become shorter"):
        write_shared([tensor("good")], tmp_path / "x.safetensors")
