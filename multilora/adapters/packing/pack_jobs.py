"""Packing of low-rank weights: brought into the model's dtype and order, checked, written where their panels lie.

A weight stays in the dtype of the file until then: scaled in fp32, rounded once, transposed, checked while still in
the cache. Called by `blocks.pack` or by the processes of `loading/packers.py`; knows neither sites nor blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from multilora.errors import AdapterInvalid
from multilora.lora.panels import RANK_GRANULE, PanelPart

TILE = 128  # columns of a weight that are transposed together
FEW_ROWS = 16  # so few are transposed as fast in one go
SIGNED = {2: torch.int16, 4: torch.int32}
UNSIGNED = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Span:
    """Rows and columns of a weight that lie together, from byte `at` of the pages on."""

    row: int
    rows: int
    col: int
    columns: int
    at: int


@dataclass(frozen=True)
class PackJob:
    """One weight and where it goes. weight: [rank, width], transposed or not."""

    name: str  # for errors: "layer 3 q_proj lora_A"
    weight: torch.Tensor
    scaling: float
    spans: tuple[Span, ...]


Put = Callable[[int, np.ndarray], None]
"""Write a contiguous array from that byte of the pages on."""


def write_jobs(jobs: list[PackJob], dtype: torch.dtype, out: torch.Tensor) -> None:
    """One after the other, into out: uint8 [pages, page_bytes]. Raises AdapterInvalid for what is not finite."""
    pages = out.view(-1).numpy()

    def put(at: int, part: np.ndarray) -> None:
        pages[at : at + part.nbytes] = part.reshape(-1).view(np.uint8)

    for job in jobs:
        write_job(job, dtype, put)


def write_job(job: PackJob, dtype: torch.dtype, put: Put) -> None:
    rows = _in_order(_cast(job.weight, job.scaling, dtype))
    if not _finite(rows, dtype):
        raise AdapterInvalid(f"{job.name}: a weight is not finite in {dtype}")
    for span in job.spans:
        part = rows[span.row : span.row + span.rows, span.col : span.col + span.columns]
        put(span.at, np.ascontiguousarray(part))


def spans_of(rank: int, parts: tuple[PanelPart, ...], page_bytes: int, itemsize: int) -> tuple[Span, ...]:
    """Where a weight of this rank goes, whose panels are `parts`: those that lie back to back as one."""
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
    """Is `other` where the panel number `count` behind `first` would be, without a gap?"""
    rows = count * RANK_GRANULE
    return (other.page, other.offset, other.col, other.row) == (
        first.page,
        first.offset + rows * first.columns * itemsize,
        first.col,
        first.row + rows,
    )


def _cast(weight: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """weight · scaling, computed in fp32 and rounded once; in the weight's own order of memory."""
    if scaling == 1.0:
        return weight.to(dtype)
    exact = weight if weight.dtype in (dtype, torch.float32) else weight.float()
    return torch.mul(exact, scaling, out=torch.empty_like(exact, dtype=dtype))


def _in_order(weight: torch.Tensor) -> np.ndarray:
    """As integers of its size, contiguous [rank, width]."""
    source = weight.view(SIGNED[weight.itemsize]).numpy()
    rank, width = source.shape
    if weight.is_contiguous() or rank <= FEW_ROWS or width % TILE:
        return np.ascontiguousarray(source)
    # turned tile by tile, each in a core's first cache, and then laid out row by row
    tiles = source.T.reshape(-1, TILE, rank).transpose(0, 2, 1).copy()  # [tiles, rank, TILE]
    return tiles.transpose(1, 0, 2).reshape(rank, width)


def _finite(numbers: np.ndarray, dtype: torch.dtype) -> bool:
    """As bits, an infinity lies above all finite numbers of its sign and below every NaN."""
    if numbers.size == 0:
        return True
    unsigned = UNSIGNED[dtype.itemsize]
    infinite = torch.tensor([torch.inf, -torch.inf], dtype=dtype).view(SIGNED[dtype.itemsize]).numpy()
    return bool(numbers.max() < infinite[0] and numbers.view(unsigned).max() < infinite.view(unsigned)[1])
