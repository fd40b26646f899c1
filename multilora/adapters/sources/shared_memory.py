"""Adapters in shared memory: tensors that a trainer on this machine has put there, copied into a .safetensors file.

It owns the rules of what may be read: a segment is a regular file right inside /dev/shm, of the server's own user,
never a symbolic link, and every tensor lies inside its segment. The kernel copies the bytes, without a mapping, so a
segment that shrinks meanwhile is an error and no crash. Knows nothing of PEFT: the loader checks the tensors.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from multilora.adapters.sources.files import show
from multilora.errors import BadRequest

ROOT = Path("/dev/shm")  # where Linux keeps POSIX shared memory
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
TORCH_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class SharedTensor:
    """One contiguous tensor. dtype: safetensors' name or torch's; segment: as `multiprocessing.shared_memory` names
    it, or its path; offset: of its first byte in the segment.

    Raises BadRequest for a dtype that is not read, and negative numbers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    segment: str
    offset: int = 0

    def __post_init__(self) -> None:
        known = TORCH_NAMES.get(self.dtype, self.dtype)
        if known not in ITEM_BYTES:
            raise self.error(f"dtype {show(self.dtype)}: one of {', '.join((*ITEM_BYTES, *TORCH_NAMES))} is expected")
        object.__setattr__(self, "dtype", known)
        if self.offset < 0 or any(size < 0 for size in self.shape):
            raise self.error("offset and shape must not be negative")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def error(self, message: str) -> BadRequest:
        return BadRequest(f"tensors: {show(self.name)}: {message}", param="tensors")


def write_shared(tensors: Sequence[SharedTensor], path: Path) -> None:
    """Copy the tensors into a new .safetensors file. Raises BadRequest naming the tensor that cannot be read. The
    segments may change as soon as this has returned."""
    _check(tensors)
    header = _header(tensors)
    with path.open("wb", buffering=0) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, group in groupby(tensors, lambda tensor: tensor.segment):
            run = list(group)
            with _opened(run[0]) as segment:
                for tensor in run:
                    _copy(segment, file.fileno(), tensor)


def _check(tensors: Sequence[SharedTensor]) -> None:
    if not tensors:
        raise BadRequest("tensors: the list is empty", param="tensors")
    names: set[str] = set()
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.name in names or tensor.name == "__metadata__":
            raise tensor.error("the name is given twice, or reserved")
        names.add(tensor.name)
        if tensor.segment not in sizes:
            with _opened(tensor) as segment:
                sizes[tensor.segment] = os.fstat(segment).st_size
        if tensor.offset + tensor.nbytes > sizes[tensor.segment]:
            raise tensor.error(
                f"bytes {tensor.offset} to {tensor.offset + tensor.nbytes} are outside the segment "
                f"{show(tensor.segment)} of {sizes[tensor.segment]} bytes"
            )
    if sum(tensor.nbytes for tensor in tensors) > sum(sizes.values()):
        raise BadRequest("tensors: they overlap: together they are longer than their segments", param="tensors")


@contextmanager
def _opened(tensor: SharedTensor) -> Iterator[int]:
    """A descriptor of the tensor's segment."""
    name = tensor.segment.removeprefix(f"{ROOT}/").removeprefix("/")
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise tensor.error(f"segment {show(tensor.segment)}: the name of a file right inside {ROOT} is expected")
    try:
        fd = os.open(ROOT / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, UnicodeEncodeError) as e:
        number = e.errno if isinstance(e, OSError) else errno.ENOENT
        why = {errno.ENOENT: "does not exist", errno.ELOOP: "is a symbolic link"}.get(number or 0, "cannot be opened")
        raise tensor.error(f"segment {show(tensor.segment)} {why}") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise tensor.error(f"segment {show(tensor.segment)} is not a regular file")
        if info.st_uid != os.geteuid():
            raise tensor.error(f"segment {show(tensor.segment)} belongs to another user")
        yield fd
    finally:
        os.close(fd)


def _header(tensors: Sequence[SharedTensor]) -> bytes:
    """The header of a safetensors file that holds the tensors one after the other."""
    entries, offset = {}, 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)


def _copy(segment: int, file: int, tensor: SharedTensor) -> None:
    offset, left = tensor.offset, tensor.nbytes
    while left:
        count = os.sendfile(file, segment, offset, left)
        if count == 0:
            raise tensor.error(f"segment {show(tensor.segment)} has become shorter")
        offset, left = offset + count, left - count
