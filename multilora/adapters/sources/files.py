"""The files of one adapter directory: which are read, and how a small JSON file is read safely.

It owns file names and sizes, and knows nothing of PEFT's fields or of tensors.
Called by `peft/` and `sources/`.
"""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from multilora.errors import AdapterInvalid, AdapterNotFound

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
PICKLE_NAMES = (
    "adapter_model.bin",
    "adapter_model.pt",
    "adapter_model.pth",
    "adapter_model.pkl",
    "pytorch_model.bin",
)

MAX_CONFIG_BYTES = 1 << 20  # a typical config has 1 KB, or 100 KB if it names the rank of each module
MAX_JSON_BYTES = 16 << 20  # a typical index has about 100 KB


def show(value: object, limit: int = 200) -> str:
    """`repr` for error messages: bounded, and free of characters that cannot be encoded."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


@dataclass(frozen=True)
class AdapterFiles:
    """What will be read. `index` is set when the weights are sharded; `shard_of` then maps tensor → file name."""

    config: Path
    weights: tuple[Path, ...]
    index: Path | None = None
    shard_of: dict[str, str] | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.config, *((self.index,) if self.index else ()), *self.weights)


def find_files(directory: Path) -> AdapterFiles:
    """The adapter's files; `adapter_model.safetensors` wins over an index beside it, as in PEFT.

    Raises AdapterNotFound for a missing directory or file, AdapterInvalid for pickle weights and a broken index.
    """
    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "does not exist"
        raise AdapterNotFound(f"adapter directory {show(str(directory))} {what}")
    config = directory / CONFIG_NAME
    if not os.path.exists(config):
        raise AdapterNotFound(f"{CONFIG_NAME} is missing in {show(str(directory))}")
    if os.path.exists(directory / WEIGHTS_NAME):
        return AdapterFiles(config, (directory / WEIGHTS_NAME,))
    index = directory / INDEX_NAME
    if os.path.exists(index):
        shard_of = read_index(index)
        names = sorted(set(shard_of.values()))
        for name in names:
            if not os.path.exists(directory / name):
                raise AdapterNotFound(f"{show(name)}, named in {INDEX_NAME}, is missing in {show(str(directory))}")
        return AdapterFiles(config, tuple(directory / name for name in names), index, shard_of)
    for name in PICKLE_NAMES:
        if os.path.exists(directory / name):
            raise AdapterInvalid(f"{name}: pickle files are refused, they can run code; save it as {WEIGHTS_NAME}")
    raise AdapterNotFound(f"{WEIGHTS_NAME} is missing in {show(str(directory))} (pickle files are not read)")


def open_regular(path: Path) -> BinaryIO:
    """Open for reading, unbuffered. Raises AdapterInvalid for anything but a regular file (pipe, device, directory),
    AdapterNotFound if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: opening a pipe must not block
    except OSError as e:
        kind = AdapterNotFound if isinstance(e, FileNotFoundError) else AdapterInvalid
        raise kind(f"{path.name}: cannot be read: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise AdapterInvalid(f"{path.name}: not a regular file")
    return os.fdopen(fd, "rb", buffering=0)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises AdapterInvalid, naming the file, for anything else."""
    return parse_json_object(read_json(path), path.name)


def read_json(path: Path) -> bytes:
    """The bytes of a small JSON file. Raises AdapterInvalid for one that is too long."""
    limit = MAX_CONFIG_BYTES if path.name == CONFIG_NAME else MAX_JSON_BYTES
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise AdapterInvalid(f"{path.name}: {size} bytes, at most {limit} are read")
        return file.read()


def parse_json_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `data`, strict UTF-8; a key given twice is an error. Raises AdapterInvalid."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as e:
        raise AdapterInvalid(f"{name}: not valid UTF-8 at byte {e.start}") from None
    except RecursionError:
        raise AdapterInvalid(f"{name}: not valid JSON: nested too deeply") from None
    except ValueError as e:
        raise AdapterInvalid(f"{name}: not valid JSON: {show(str(e))}") from None
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{name}: a JSON object is expected, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterInvalid(f"{path.name}: weight_map: an object that maps tensors to files is expected")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\0" in name:
            raise AdapterInvalid(
                f"{path.name}: weight_map: {show(tensor)} names {show(name)}, not a .safetensors file beside it"
            )
    return weight_map
