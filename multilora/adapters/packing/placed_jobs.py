"""Packing jobs over memory or a file, by place: what processes and GPUs are told of them, in plain types.

`FileWeight` is a tensor of a file and the jobs over it; `pack_table` makes a table of numbers of them, for a GPU that
packs an adapter from the bytes of its file. Called by `loading/`.
"""

import mmap
from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from multilora.adapters.pack_table import HALF, PART_BYTES, PackTable
from multilora.adapters.packing.pack_jobs import PackJob, Span
from multilora.kernels.integers import cdiv
from multilora.lora.panels import RANK_GRANULE

TABLE_BYTES = 256 << 10
"""The longest table: that of some 4,000 stretches of weights, a quarter of a message to the engine."""


class PlacedJob(msgspec.Struct, array_like=True, frozen=True):
    """A `PackJob` over memory that the other end has. start: in bytes; shape, strides: in elements."""

    name: str
    start: int
    dtype: str
    shape: tuple[int, int]
    strides: tuple[int, int]
    scaling: float
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, job: PackJob, start: int) -> "PlacedJob":
        """The job, with its weight at byte `start`."""
        weight = job.weight
        dtype, strides = str(weight.dtype).removeprefix("torch."), weight.stride()
        shape = weight.shape[0], weight.shape[1]
        return cls(job.name, start, dtype, shape, (strides[0], strides[1]), job.scaling, job.spans)

    def within(self, memory: mmap.mmap | bytearray) -> PackJob:
        """The job itself, over `memory`."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        dtype = getattr(torch, self.dtype)
        flat = torch.frombuffer(memory, dtype=dtype, count=extent, offset=self.start)
        return PackJob(self.name, flat.as_strided(self.shape, self.strides), self.scaling, self.spans)


class FileWeight(msgspec.Struct, array_like=True, frozen=True):
    """Bytes of a file, and what is packed from them: starts of jobs count from the first of these bytes."""

    start: int
    nbytes: int
    jobs: list[PlacedJob]


class FilePart(msgspec.Struct, array_like=True, frozen=True):
    """Bytes of a file as they are read at once, and what is checked of them."""

    start: int
    nbytes: int
    numbers: list["PartNumbers"]


class PartNumbers(msgspec.Struct, array_like=True, frozen=True):
    """Numbers of one job: from byte `start` of a part on, so many bytes of them."""

    name: str
    start: int
    nbytes: int
    scaling: float


def file_parts(weights: Sequence[FileWeight], size: int, part_bytes: int) -> list[FilePart]:
    """All bytes of a file of `size` bytes in parts of `part_bytes`. weights: in its order; each is one job's."""
    parts = [FilePart(start, min(part_bytes, size - start), []) for start in range(0, size, part_bytes)]
    for weight in weights:
        job, end = weight.jobs[0], weight.start + weight.nbytes
        for number in range(weight.start // part_bytes, cdiv(end, part_bytes)):
            part = parts[number]
            first, last = max(weight.start, part.start), min(end, part.start + part.nbytes)
            part.numbers.append(PartNumbers(job.name, first - part.start, last - first, job.scaling))
    return parts


def pack_table(weights: Sequence[FileWeight], begin: int, end: int, dtype: torch.dtype) -> PackTable | None:
    """The table of an adapter. weights: in the order of the file, whose tensors are bytes [begin, end). None: no GPU
    packs it, as its numbers are not as long as packed ones, or a tensor is larger than a part or not one job's alone,
    or the table too long."""
    stored, kind = {job.dtype for weight in weights for job in weight.jobs}, str(dtype).removeprefix("torch.")
    if len(stored) != 1 or not {kind, *stored} <= {*HALF} or not all(map(_as_one, weights)):
        return None
    rows: list[tuple[int, ...]] = []
    parts: list[tuple[int, int, int, int]] = []
    first, since = 0, 0  # of the part that is being filled: byte and row
    for weight in weights:
        start = weight.start - begin
        if start + weight.nbytes - first > PART_BYTES:
            parts.append((first, start - first, since, len(rows) - since))
            first, since = start, len(rows)
        rows += _rows(weight.jobs[0], (start - first) // 2)
    parts.append((first, end - begin - first, since, len(rows) - since))
    table = np.array(rows, np.int64).tobytes()
    if len(table) > TABLE_BYTES or any(nbytes > PART_BYTES for _, nbytes, _, _ in parts):
        return None
    return PackTable(stored.pop(), kind, table, end - begin, parts)


def _as_one(weight: FileWeight) -> bool:
    """Whether it is all of one job's numbers."""
    shape = weight.jobs[0].shape
    return len(weight.jobs) == 1 and 2 * shape[0] * shape[1] == weight.nbytes <= PART_BYTES


def _rows(job: PlacedJob, start: int) -> list[tuple[int, ...]]:
    """The rows of one job. start: of its tensor, in elements."""
    scaling = int(np.float32(job.scaling).view(np.int32))
    row, column = job.strides
    return [
        (start + job.start // 2 + span.row * row + span.col * column, row, column, span.rows, span.columns,
         span.at // 2, scaling, cdiv(span.rows, RANK_GRANULE) * RANK_GRANULE)
        for span in job.spans
    ]  # fmt: skip
