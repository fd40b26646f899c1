"""Files that are broken, lie, or are something else; each is a typed error that names the file."""

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from multilora.adapters.peft.safetensors_file import SLAB_BYTES, SafetensorsFile
from multilora.adapters.thread_pool import ReaderPool, Slab
from multilora.errors import AdapterError, AdapterInvalid, AdapterUnsupported

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def pack(header: Any, data: bytes = b"\0" * 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BROKEN = {
    "empty": (b"", "not a safetensors file"),
    "a zip": (b"PK\3\4" + b"\1" * 200, "not a safetensors file"),
    "a pickle": (b"\x80\x02}q\0." + b"\0" * 200, "not a safetensors file"),
    "header longer than the file": (struct.pack("<Q", 5000) + b"{}", "truncated"),
    "header of 2^60 bytes": (struct.pack("<Q", 1 << 60) + b"{}" * 50, "not a safetensors file"),
    "header not JSON": (pack(b"{nonsense"), "not valid JSON"),
    "header not UTF-8": (pack(b'{"\xff": 1}'), "not valid UTF-8"),
    "header nested": (pack(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "header a list": (pack(b"[1]"), "not a safetensors file"),
    "name given twice": (pack(b'{"a": {}, "a": {}}'), "given twice"),
    "entry a number": (pack({"a": 3}), "tensor 'a'"),
    "no dtype": (pack({"a": {**GOOD, "dtype": None}}), "tensor 'a': dtype"),
    "shape negative": (pack({"a": {**GOOD, "shape": [-2, -3]}}), "tensor 'a': shape"),
    "shape of floats": (pack({"a": {**GOOD, "shape": [2.0, 3]}}), "tensor 'a': shape"),
    "shape of bools": (pack({"a": {**GOOD, "shape": [True, 6]}}), "tensor 'a': shape"),
    "shape huge": (pack({"a": {**GOOD, "shape": [1 << 61, 1 << 61]}}), "tensor 'a': shape"),
    "shape too long": (pack({"a": {**GOOD, "shape": [1] * 10_000 + [6]}}), "tensor 'a': shape"),
    "shape and size disagree": (pack({"a": {**GOOD, "shape": [2, 4]}}), "tensor 'a': shape"),
    "offsets reversed": (pack({"a": {**GOOD, "data_offsets": [24, 0]}}), "tensor 'a': data_offsets"),
    "offsets missing": (pack({"a": {"dtype": "F32", "shape": [2, 3]}}), "tensor 'a': data_offsets"),
    "data cut": (pack({"a": GOOD}, b"\0" * 20), "truncated"),
    "data declared huge": (
        pack({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        "truncated",
    ),
    "bytes behind": (pack({"a": GOOD}, b"\0" * 25), "behind the last tensor"),
    "overlap": (pack({"a": GOOD, "b": GOOD}), "overlap"),
    "hole": (pack({"a": {**GOOD, "data_offsets": [8, 32]}}, b"\0" * 32), "hole"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case: str, tmp_path: Path) -> None:
    data, said = BROKEN[case]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterInvalid) as caught:
        SafetensorsFile(path)
    assert "adapter_model.safetensors" in caught.value.message
    assert said in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "I32", "BOOL", "NEW"])
def test_other_dtypes_are_refused_by_name(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(pack({"a": {**GOOD, "dtype": dtype}}))
    with pytest.raises(AdapterUnsupported, match=f"w.safetensors: tensor 'a': dtype '{dtype}'"):
        SafetensorsFile(tmp_path / "w.safetensors")


def test_values_of_every_dtype(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 7),
        "b": torch.randn(3, 1, dtype=torch.bfloat16),
        "c": torch.randn(64, 9, dtype=torch.float16),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "w.safetensors") as file:
        assert file.tensors.keys() == tensors.keys()
        for name in ("c", "a", "empty", "b", "scalar", "c"):
            value = file.read(name)
            assert value.dtype == tensors[name].dtype
            assert torch.equal(value, tensors[name])


def test_a_file_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(4, 4)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 70)
        with pytest.raises(AdapterInvalid, match=r"w.safetensors: truncated: the data of '.'"):
            file.read("a")


def test_a_file_of_many_slabs_read_by_a_pool(tmp_path: Path) -> None:
    """Tensors lie across the borders of slabs."""
    tensors = {str(i): torch.arange(i, i + 300_000, dtype=torch.float32) for i in range(9)}
    save_file(tensors, tmp_path / "w.safetensors")
    with SafetensorsFile(tmp_path / "w.safetensors", ReaderPool(3)) as file:
        assert sum(info.nbytes for info in file.tensors.values()) > 5 * SLAB_BYTES
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor)


def test_what_is_not_at_hand_is_read_by_the_pool(tmp_path: Path) -> None:
    """Every second slab comes from the page cache; of the first only half is there, so all of it is read again."""
    tensors = {name: torch.randn(SLAB_BYTES // 4 + 100) for name in "abcde"}
    save_file(tensors, tmp_path / "w.safetensors")
    asked: list[Slab] = []

    def read_cached(fd: int, slabs: list[Slab], memory: torch.Tensor) -> list[Slab]:
        asked.extend(slabs)
        view = memory.numpy().data
        view[slabs[0][1] : slabs[0][1] + 1000] = os.pread(fd, 1000, slabs[0][0])
        for first, at, nbytes in slabs[1::2]:
            view[at : at + nbytes] = os.pread(fd, nbytes, first)
        return slabs[::2]

    with SafetensorsFile(tmp_path / "w.safetensors", ReaderPool(3, read_cached=read_cached)) as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor)
    assert len(asked) == 6


def test_a_wide_dtype_behind_a_narrow_one_need_not_be_aligned(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]},
    }
    (tmp_path / "w.safetensors").write_bytes(pack(header, b"\0\0" + struct.pack("<2f", 1.5, -2.0)))
    with SafetensorsFile(tmp_path / "w.safetensors") as file:
        assert file.read("b").tolist() == [1.5, -2.0]


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_bytes_never_end_in_another_error(tmp_path: Path, data: st.DataObject) -> None:
    good = bytearray(save({"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2).half()}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "w.safetensors"
    path.write_bytes(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    with contextlib.suppress(AdapterError), SafetensorsFile(path) as file:
        for name in file.tensors:
            file.read(name)


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7, 2, 3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "w.safetensors")
    with SafetensorsFile(tmp_path / "w.safetensors") as file:
        for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3)):
            assert torch.equal(file.read_rows("b", start, stop), tensors["b"][start:stop])
        os.truncate(tmp_path / "w.safetensors", (tmp_path / "w.safetensors").stat().st_size - 1)
        with pytest.raises(AdapterInvalid, match=r"w.safetensors: truncated: the data of '.' ends early"):
            [file.read_rows(name, 0, len(tensors[name])) for name in tensors]


def test_large_tensors_are_left_out_until_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multilora.adapters.peft.safetensors_file.LARGE_BYTES", 100)
    tensors = {"a": torch.randn(5), "b": torch.randn(26), "c": torch.randn(25), "d": torch.randn(2, 200)}
    save_file(tensors, tmp_path / "w.safetensors")
    with SafetensorsFile(tmp_path / "w.safetensors", ReaderPool(2)) as file:
        assert file.read("a").untyped_storage().nbytes() == 4 * (5 + 25)
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor)
