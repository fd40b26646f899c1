"""Reads one safetensors file, which need not be trusted.

The header is checked at once. Several threads read the data while the caller looks at the header; without threads the
data is read when it is first used. A file that is truncated meanwhile is an error, where a memory map would raise a
signal. It knows nothing of LoRA. Called by `contents.py`.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

import itertools
import math
import os
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch

from multilora.adapters.sources.files import open_regular, parse_json_object, show
from multilora.adapters.thread_pool import ALONE, ReaderPool, Slab
from multilora.errors import AdapterInvalid, AdapterUnsupported

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 8
SLAB_BYTES = 2 << 20
KNOWN_HEADER_BYTES = 1 << 20  # larger headers are not cached
LARGE_BYTES = 64 << 20  # larger tensors, such as tables of the vocabulary, are read alone, and only on request
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass
class _Shared:
    """The bytes of all tensors but the large ones, one after the other, and where each begins."""

    data: torch.Tensor  # uint8
    starts: dict[str, int]
    typed: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)  # `data` as numbers

    def view(self, name: str, info: TensorInfo) -> torch.Tensor:
        """The tensor `name`, without a copy where it is aligned."""
        start, size = self.starts[name], info.dtype.itemsize
        if start % size:  # it follows a tensor of a narrower dtype
            return self.data[start : start + info.nbytes].clone().view(info.dtype).view(info.shape)
        if info.dtype not in self.typed:
            self.typed[info.dtype] = self.data[: len(self.data) // size * size].view(info.dtype)
        strides = [math.prod(info.shape[i + 1 :]) for i in range(len(info.shape))]
        return self.typed[info.dtype].as_strided(info.shape, strides, start // size)


class SafetensorsFile:
    """An open file. `tensors`: what its header declares, already checked against the file's size."""

    def __init__(self, path: Path, readers: ReaderPool = ALONE):
        """Raises AdapterNotFound, AdapterInvalid naming file and tensor, AdapterUnsupported for another dtype."""
        self.path = path
        self._readers = readers
        self._shared: Future[_Shared] | None = None
        self._data: _Shared | None = None  # its result
        self._file = open_regular(path)
        self.header = b""  # with its length
        self.size = os.fstat(self._file.fileno()).st_size
        try:
            self.tensors = self._read_header()
        except BaseException:
            self._file.close()
            raise
        if not readers.alone:
            self.read_ahead()

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._shared is not None and not self._shared.cancel():
            wait([self._shared])
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype. The first call reads all tensors but the large ones, into shared memory.

        Raises AdapterInvalid if the file has become shorter.
        """
        info = self.tensors[name]
        if info.nbytes > LARGE_BYTES:
            return self.read_rows(name, 0, info.shape[0])
        if self._data is None:
            self.read_ahead()
            assert self._shared is not None
            self._data = self._shared.result()
        return self._data.view(name, info)

    def read_ahead(self) -> None:
        """Start to read what the first call of `read` would, on another thread if `readers` has one."""
        if self._shared is None:
            self._shared = self._readers.start(self._read_shared)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in its stored dtype and in memory of their own. Raises as `read` does."""
        info = self.tensors[name]
        rows = (stop - start, *info.shape[1:])
        row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
        data = self._read_bytes([(info.start + start * row_bytes, math.prod(rows) * info.dtype.itemsize)])
        return data.view(info.dtype).view(rows)

    def _read_shared(self) -> "_Shared":
        """Read all tensors but the large ones, in the order of the file, so that disks read ahead."""
        names = sorted((n for n, i in self.tensors.items() if i.nbytes <= LARGE_BYTES), key=self._place)
        ends = itertools.accumulate(self.tensors[name].nbytes for name in names)
        starts = {name: end - self.tensors[name].nbytes for name, end in zip(names, ends, strict=True)}
        return _Shared(self._read_bytes([self._place(name) for name in names]), starts)

    def _place(self, name: str) -> tuple[int, int]:
        return self.tensors[name].start, self.tensors[name].nbytes

    def _read_bytes(self, parts: list[tuple[int, int]]) -> torch.Tensor:
        """Parts of the file, (start, bytes) each, one after the other, as uint8."""
        data = self._readers.memory(sum(nbytes for _, nbytes in parts))
        slabs: list[Slab] = []
        at = 0
        for start, nbytes in _joined(parts):
            for first in range(0, nbytes, SLAB_BYTES):
                size = min(SLAB_BYTES, nbytes - first)
                slabs.append((start + first, at, size))
                at += size
        view = data.numpy().data
        left = self._readers.read_cached(self._file.fileno(), slabs, data)
        self._readers.each(lambda slab: self._fill(slab[0], view[slab[1] : slab[1] + slab[2]]), left)
        return data

    def _fill(self, start: int, target: memoryview) -> None:
        """Read all of `target` from `start` on."""
        while target:
            got = os.preadv(self._file.fileno(), [target], start)
            if not got:
                name = next(n for n, info in self.tensors.items() if info.start <= start < info.start + info.nbytes)
                raise AdapterInvalid(f"{self.path.name}: truncated: the data of {show(name)} ends early")
            start, target = start + got, target[got:]

    def _read_header(self) -> dict[str, TensorInfo]:
        name = self.path.name
        size = self.size
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        if size < 10 or length > MAX_HEADER_BYTES:
            raise AdapterInvalid(f"{name}: not a safetensors file")
        if 8 + length > size:
            raise AdapterInvalid(
                f"{name}: truncated, or not a safetensors file: a header of {length} bytes is declared"
            )
        data = self._file.read(length)
        self.header = prefix + data
        known = _known_header if length <= KNOWN_HEADER_BYTES else _known_header.__wrapped__
        return known(data, size, name)


@lru_cache(maxsize=16)
def _known_header(data: bytes, size: int, name: str) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes with this header. Adapters made alike share it: do not modify it."""
    if data[:1] != b"{":
        raise AdapterInvalid(f"{name}: not a safetensors file")
    header = parse_json_object(data, f"{name}: header")
    header.pop("__metadata__", None)
    start = 8 + len(data)
    tensors = {key: _entry(key, value, start, name) for key, value in header.items()}
    _check_layout(tensors, start, size, name)
    return tensors


def _entry(key: str, value: Any, data_start: int, file: str) -> TensorInfo:
    where = f"{file}: tensor {show(key)}"
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


def _check_layout(tensors: dict[str, TensorInfo], start: int, size: int, file: str) -> None:
    """Check that tensors follow each other without holes or overlaps and fill the file. Raises AdapterInvalid."""
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != start:
            raise AdapterInvalid(f"{file}: tensor {show(key)}: data_offsets leave a hole or overlap")
        start += info.nbytes
    if start > size:
        raise AdapterInvalid(f"{file}: truncated: {start} bytes are declared, the file has {size}")
    if start < size:
        raise AdapterInvalid(f"{file}: {size - start} bytes behind the last tensor")


def _joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same parts, with those that touch merged."""
    joined: list[tuple[int, int]] = []
    for start, nbytes in parts:
        if joined and sum(joined[-1]) == start:
            start, nbytes = joined[-1][0], joined.pop()[1] + nbytes
        joined.append((start, nbytes))
    return joined


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)
