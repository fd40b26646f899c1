"""Missing files, files of another kind, and JSON that is not what it should be."""

import json
import os
from pathlib import Path

import pytest

from multilora.adapters.sources.files import find_files, open_regular, read_json_object, show
from multilora.errors import AdapterError, AdapterInvalid, AdapterNotFound

INDEX = "adapter_model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match=r"nowhere.*does not exist"):
        find_files(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterNotFound, match=r"file.*not a directory"):
        find_files(tmp_path / "file")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match=r"adapter_config.json is missing"):
        find_files(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterNotFound, match=r"adapter_model.safetensors is missing"):
        find_files(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_pickle_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"\x80\x02}.")
    with pytest.raises(AdapterInvalid, match=f"{name}: pickle files are refused"):
        find_files(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"")  # beside safetensors it is not looked at
    assert find_files(folder).weights == (folder / "adapter_model.safetensors",)


@pytest.mark.parametrize(
    ("index", "error", "said"),
    [
        ({}, AdapterInvalid, "weight_map"),
        ({"weight_map": []}, AdapterInvalid, "weight_map"),
        ({"weight_map": {"a": 3}}, AdapterInvalid, "'a' names 3"),
        ({"weight_map": {"a": "../w.safetensors"}}, AdapterInvalid, "'../w.safetensors'"),
        ({"weight_map": {"a": "/etc/w.safetensors"}}, AdapterInvalid, "'/etc/w.safetensors'"),
        ({"weight_map": {"a": "w.bin"}}, AdapterInvalid, "'w.bin'"),
        ({"weight_map": {"a": "w.safetensors"}}, AdapterNotFound, "'w.safetensors'"),
    ],
)
def test_index(index: object, error: type[AdapterError], said: str, folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(error) as caught:
        find_files(folder)
    assert INDEX in caught.value.message
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "found list"),
        (b"null", "found NoneType"),
        (b'{"r": 1, "r": 2}', "'r' is given twice"),
        (b'{"r": "\xff"}', "not valid UTF-8 at byte 7"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=["empty", "cut", "list", "null", "twice", "utf-8", "nested", "digits"],
)
def test_json(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(data)
    with pytest.raises(AdapterInvalid) as caught:
        read_json_object(path)
    assert caught.value.message.startswith("adapter_config.json: ")
    assert said in caught.value.message


def test_a_file_that_is_no_file(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")  # opening it the usual way would wait for ever
    (folder / "adapter_model.safetensors").mkdir()
    with pytest.raises(AdapterInvalid, match=r"adapter_config.json: not a regular file"):
        open_regular(folder / "adapter_config.json")
    with pytest.raises(AdapterInvalid, match=r"adapter_model.safetensors: not a regular file"):
        open_regular(folder / "adapter_model.safetensors")


def test_json_too_large(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(AdapterInvalid, match=r"adapter_config.json: 1073741824 bytes"):
        read_json_object(path)


def test_show() -> None:
    assert show("é\ud800") == "'\\xe9\\ud800'"
    assert len(show("x" * 10_000)) < 250
