"""Packing of low-rank weights: each is scaled in fp32, rounded once to the model's dtype, transposed, checked while
it is still in the cache, and written where its panels lie. Until then it stays in the dtype of the file.

It knows neither sites nor blocks. Called by `blocks.py` and `loading/packers.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from multilora.errors import AdapterInvalid
from multilora.lora.panels import RANK_GRANULE, PanelPart

FEW_ROWS = 16  # up to this rank, one transposition is as fast as many of blocks
BLOCK = 16384  # numbers that are transposed together: source and target stay in the first-level cache
SIGNED = {2: torch.int16, 4: torch.int32}
UNSIGNED = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Span:
    """Rows and columns of a weight that lie together, row-major, from byte `at` of the pages on."""

    row: int
    rows: int
    col: int
    columns: int
    at: int


@dataclass(frozen=True)
class PackJob:
    """One weight and where it goes. weight: [rank, width], with any strides."""

    name: str  # for errors: "layer 3 q_proj lora_A"
    weight: torch.Tensor
    scaling: float
    spans: tuple[Span, ...]


Put = Callable[[int, np.ndarray], None]
"""(at, array): write an array [rows, columns] with any strides, row by row, from byte `at` of the pages on."""


def write_jobs(jobs: list[PackJob], dtype: torch.dtype, out: torch.Tensor) -> None:
    """Do all jobs, in order, into out: uint8 [pages, page_bytes]. Raises AdapterInvalid, as `write_job` does."""
    pages = out.view(-1).numpy()
    for job in jobs:
        write_job(job, dtype, lambda at, part: write_part(pages, at, part))


def write_job(job: PackJob, dtype: torch.dtype, put: Put) -> None:
    """Do one job. Raises AdapterInvalid if a number is not finite in `dtype`."""
    rows = _cast(job.weight, job.scaling, dtype).view(SIGNED[dtype.itemsize]).numpy()
    if not _finite(rows, dtype):
        raise _not_finite(job.name, dtype)
    for span in job.spans:
        put(span.at, rows[span.row : span.row + span.rows, span.col : span.col + span.columns])


def check_numbers(numbers: torch.Tensor, scaling: float, dtype: torch.dtype, name: str) -> None:
    """Raise what `write_job` would of a job `name` over `numbers`, of any shape. Scaling and rounding keep the order
    of numbers, so the largest positive and the largest negative one decide, or a NaN, whose bits lie above both."""
    bits = numbers.view(SIGNED[numbers.itemsize]).numpy()
    ends = np.array([bits.max(), bits.view(UNSIGNED[numbers.itemsize]).max().astype(bits.dtype)])
    if not bool(_cast(torch.from_numpy(ends).view(numbers.dtype), scaling, dtype).isfinite().all()):
        raise _not_finite(name, dtype)


def write_part(pages: np.ndarray, at: int, part: np.ndarray) -> None:
    """What `Put` does, into pages: uint8 [bytes]."""
    target = pages[at : at + part.nbytes].view(part.dtype).reshape(part.shape)
    rows, columns = part.shape
    step = columns if rows <= FEW_ROWS or part.flags.c_contiguous else max(1, BLOCK // rows)
    for first in range(0, columns, step):
        target[:, first : first + step] = part[:, first : first + step]


def spans_of(rank: int, parts: tuple[PanelPart, ...], page_bytes: int, itemsize: int) -> tuple[Span, ...]:
    """Where a weight of this rank goes, whose panels are `parts`; parts that lie back to back become one span."""
    spans = []
    top, first = parts[0].row, 0
    while first < len(parts):
        part, count = parts[first], 1
        while first + count < len(parts) and _follows(part, parts[first + count], count, itemsize):
            count += 1
        row = part.row - top
        rows = min(RANK_GRANULE * count, rank - row)  # rows beyond the rank stay zero
        spans.append(Span(row, rows, part.col, part.columns, part.page * page_bytes + part.offset))
        first += count
    return tuple(spans)


def _follows(first: PanelPart, other: PanelPart, count: int, itemsize: int) -> bool:
    """Whether `other` lies where, without a gap, the panel number `count` after `first` would be."""
    rows = count * RANK_GRANULE
    return (other.page, other.offset, other.col, other.row) == (
        first.page,
        first.offset + rows * first.columns * itemsize,
        first.col,
        first.row + rows,
    )


def _not_finite(name: str, dtype: torch.dtype) -> AdapterInvalid:
    return AdapterInvalid(f"{name}: a weight is not finite in {dtype}")


def _cast(weight: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """weight · scaling in `dtype`, computed in fp32 and rounded once, with the weight's own strides."""
    if scaling == 1.0:
        return weight.to(dtype)
    exact = weight if weight.dtype in (dtype, torch.float32) else weight.float()
    return torch.mul(exact, scaling, out=torch.empty_like(exact, dtype=dtype))


def _finite(numbers: np.ndarray, dtype: torch.dtype) -> bool:
    """Whether all numbers are finite, by their bits: those of an infinity lie above all finite numbers of its sign
    and below every NaN."""
    if numbers.size == 0:
        return True
    unsigned = UNSIGNED[dtype.itemsize]
    infinite = torch.tensor([torch.inf, -torch.inf], dtype=dtype).view(SIGNED[dtype.itemsize]).numpy()
    return bool(numbers.max() < infinite[0] and numbers.view(unsigned).max() < infinite.view(unsigned)[1])
