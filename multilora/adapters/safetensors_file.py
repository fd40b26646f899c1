"""Reads one safetensors file tensor by tensor, from a file that nobody has to trust.

Each tensor is read straight into its own memory; a file that is cut while it is read is an error and not a signal,
which a memory map would give. Knows nothing of LoRA. Called by `checkpoint`.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch

from multilora.adapters.files import open_regular, parse_json_object, show
from multilora.errors import AdapterInvalid, AdapterUnsupported

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_DIMS = 8
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """An open file. `tensors`: what its header declares, already checked against the file's size."""

    def __init__(self, path: Path):
        """Raises AdapterNotFound, AdapterInvalid naming file and tensor, AdapterUnsupported for another dtype."""
        self.path = path
        self._file = open_regular(path)
        try:
            self.tensors = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype. Raises AdapterInvalid if the file has become shorter."""
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        self._fill(out.view(-1).view(torch.uint8), info.start, name)
        return out

    def _fill(self, target: torch.Tensor, start: int, name: str) -> None:
        """Read `target.numel()` bytes at `start` into `target`, which is uint8 and one-dimensional."""
        view = target.numpy().data
        self._file.seek(start)
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise AdapterInvalid(f"{self.path.name}: truncated: the data of {show(name)} ends early")
            done += got

    def _read_header(self) -> dict[str, TensorInfo]:
        name = self.path.name
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 10 or length > MAX_HEADER_BYTES:
            raise AdapterInvalid(f"{name}: not a safetensors file")
        if 8 + length > size:
            raise AdapterInvalid(
                f"{name}: truncated, or not a safetensors file: a header of {length} bytes is declared"
            )
        data = self._file.read(length)
        if data[:1] != b"{":
            raise AdapterInvalid(f"{name}: not a safetensors file")
        header = parse_json_object(data, f"{name}: header")
        header.pop("__metadata__", None)
        tensors = {key: self._entry(key, value, 8 + length) for key, value in header.items()}
        self._check_layout(tensors, 8 + length, size)
        return tensors

    def _entry(self, key: str, value: Any, data_start: int) -> TensorInfo:
        where = f"{self.path.name}: tensor {show(key)}"
        if not isinstance(value, dict):
            raise AdapterInvalid(f"{where}: an object is expected in the header")
        dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
        if not isinstance(dtype, str):
            raise AdapterInvalid(f"{where}: dtype: a string is expected, found {show(dtype)}")
        if dtype not in DTYPES:
            raise AdapterUnsupported(f"{where}: dtype {show(dtype)} is not served; known: {', '.join(DTYPES)}")
        if not _is_sizes(shape) or len(shape) > MAX_DIMS:
            raise AdapterInvalid(f"{where}: shape: a list of sizes is expected, found {show(shape)}")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise AdapterInvalid(f"{where}: data_offsets: [begin, end] is expected, found {show(offsets)}")
        nbytes = offsets[1] - offsets[0]
        if math.prod(shape) * DTYPES[dtype].itemsize != nbytes:
            raise AdapterInvalid(f"{where}: shape {show(shape)} in {dtype} does not fill its {nbytes} bytes")
        return TensorInfo(DTYPES[dtype], tuple(shape), data_start + offsets[0], nbytes)

    def _check_layout(self, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
        """As the format says: tensors follow each other without holes or overlaps and fill the file."""
        for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if info.start != start:
                raise AdapterInvalid(f"{self.path.name}: tensor {show(key)}: data_offsets leave a hole or overlap")
            start += info.nbytes
        if start > size:
            raise AdapterInvalid(f"{self.path.name}: truncated: {start} bytes are declared, the file has {size}")
        if start < size:
            raise AdapterInvalid(f"{self.path.name}: {size - start} bytes behind the last tensor")


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)
