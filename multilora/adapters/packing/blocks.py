"""Packing: an adapter's blocks become the bytes of its pages, ready to copy.

The layout is `lora/panels.py`'s; here scalings are folded in, the numbers are cast to the model's dtype and put in
their place. What needs the base model's weights (norms of DoRA, differences of biases) is left to
`loading/finish.py`. Called in the loader process; knows neither files nor the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from multilora.adapters.adapter import Adapter, Full, LowRank, Rows, Vector, VectorKind
from multilora.adapters.packing.pack_jobs import PackJob, Span, spans_of, write_jobs
from multilora.errors import AdapterIncompatible, AdapterInvalid
from multilora.lora.panels import (
    RANK_GRANULE,
    AdapterShape,
    FullWeightShape,
    Matrix,
    PanelGeometry,
    PanelLayout,
    PanelPart,
    ScaleShift,
    place_panels,
    round_rank,
)
from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice

SCALE_SHIFT_OF = {
    VectorKind.MAGNITUDE: ScaleShift.DORA,
    VectorKind.BIAS: ScaleShift.BIAS,
    VectorKind.LORA_BIAS: ScaleShift.LORA_BIAS,
}


@dataclass(frozen=True)
class PackTarget:
    """What adapters are packed for: the sites, dtype and page size of one engine."""

    sites: tuple[LoraSite, ...]
    dtype: torch.dtype
    page_bytes: int

    @property
    def geometry(self) -> PanelGeometry:
        return PanelGeometry(self.page_bytes, self.dtype.itemsize)

    def layout(self, shape: AdapterShape) -> PanelLayout:
        """Raises AdapterIncompatible if a row of a whole module is larger than a page."""
        try:
            return place_panels(self.sites, shape, self.geometry)
        except ValueError as e:
            raise AdapterIncompatible(f"incompatible: {e}; start with a larger --page-size") from None


Key = tuple[int, str]  # layer, module


@dataclass(frozen=True)
class Blocks:
    """An adapter's blocks by where they act. `full_weights` is in the order of the shape."""

    low_rank: dict[Key, LowRank]
    vectors: dict[Key, dict[ScaleShift, Vector]]
    full_weights: list[Full | Rows]

    @classmethod
    def of(cls, adapter: Adapter) -> "Blocks":
        vectors: dict[Key, dict[ScaleShift, Vector]] = {}
        for block in adapter.blocks:
            if isinstance(block, Vector):
                vectors.setdefault((block.layer, block.module), {})[SCALE_SHIFT_OF[block.kind]] = block
        return cls(
            {(b.layer, b.module): b for b in adapter.blocks if isinstance(b, LowRank)},
            vectors,
            [b for b in adapter.blocks if isinstance(b, Full | Rows)],
        )

    def shape(self, sites: tuple[LoraSite, ...]) -> AdapterShape:
        ranks = tuple(tuple(self._rank(site, s) for s in site.slices) for site in sites)
        scale_shift: tuple[tuple[int, ...], ...] = ()
        if self.vectors:
            scale_shift = tuple(tuple(self._scale_shift(site, s) for s in site.slices) for site in sites)
        return AdapterShape(ranks, scale_shift, tuple(_full_weight_shape(b) for b in self.full_weights))

    def _rank(self, site: LoraSite, part: LoraSlice) -> int:
        block = self.low_rank.get((site.layer, part.module))
        return block.rank if block else 0

    def _scale_shift(self, site: LoraSite, part: LoraSlice) -> int:
        return int(sum(self.vectors.get((site.layer, part.module), ())))


def _full_weight_shape(block: Full | Rows) -> FullWeightShape:
    rows = block.weight.shape[0] if block.weight.ndim == 2 else 1
    if isinstance(block, Rows):
        return FullWeightShape(MODEL_LEVEL, block.module, rows, block.weight.shape[-1], block.token_ids)
    return FullWeightShape(block.layer, block.module, rows, block.weight.shape[-1])


WriteJobs = Callable[[list[PackJob], torch.dtype, torch.Tensor], None]


def pack(
    blocks: Blocks, target: PackTarget, layout: PanelLayout, out: torch.Tensor, write: WriteJobs = write_jobs
) -> None:
    """Write the adapter's pages into `out`, uint8 [layout.num_pages, page_bytes], which must be zero.

    A scale-shift pair is written unfinished: the magnitude (or 1), and the trained bias plus lora_B's (or 0).
    Raises AdapterInvalid if a weight is not finite in the target dtype.
    """
    for matrix, chunks in zip(layout.matrices, layout.chunks, strict=True):
        if matrix.scale_shift:
            site = target.sites[matrix.site]
            _pack_scale_shift(blocks.vectors[site.layer, site.slices[matrix.slice].module], chunks, target, out)
    for full, chunks in zip(blocks.full_weights, layout.full_weights, strict=True):
        _pack_full_weight(full, chunks, target, out)
    jobs = []
    for plan in _job_plans(target.sites, layout.shape, target.geometry):
        block = blocks.low_rank[plan.key]
        weight, scaling = (block.b, block.scaling) if plan.is_b else (block.a, 1.0)
        jobs.append(PackJob(plan.name, weight, scaling, plan.spans))
    write(jobs, target.dtype, out)


@dataclass(frozen=True)
class _JobPlan:
    """Where one weight goes, whatever its numbers are."""

    key: Key
    is_b: bool
    name: str
    spans: tuple[Span, ...]


@lru_cache(maxsize=16)
def _job_plans(sites: tuple[LoraSite, ...], shape: AdapterShape, geometry: PanelGeometry) -> tuple[_JobPlan, ...]:
    layout = place_panels(sites, shape, geometry)
    plans: list[_JobPlan] = []
    for matrix, chunks in zip(layout.matrices, layout.chunks, strict=True):
        if not matrix.scale_shift:
            plans += _plans_of(matrix, chunks, sites[matrix.site], shape, geometry)
    return tuple(plans)


def _plans_of(
    matrix: Matrix, chunks: tuple[PanelPart, ...], site: LoraSite, shape: AdapterShape, geometry: PanelGeometry
) -> Iterator[_JobPlan]:
    """Of the B of a slice, or of the stacked A: one for each slice that has some."""
    cuts = len(chunks) * RANK_GRANULE // matrix.rank  # of one panel
    is_b, at = matrix.slice >= 0, 0
    for i, part in enumerate(site.slices):
        rank = shape.ranks[site.index][i]
        if rank == 0 or (is_b and i != matrix.slice):
            continue
        end = at + round_rank(rank) // RANK_GRANULE * cuts
        spans = spans_of(rank, chunks[at:end], geometry.page_bytes, geometry.itemsize)
        name = f"layer {site.layer} {part.module} lora_{'B' if is_b else 'A'}"
        yield _JobPlan((site.layer, part.module), is_b, name, spans)
        at = end


def _pack_scale_shift(
    vectors: dict[ScaleShift, Vector], chunks: tuple[PanelPart, ...], target: PackTarget, out: torch.Tensor
) -> None:
    width = next(iter(vectors.values())).value.numel()
    pair = torch.zeros(2, width)
    pair[0] = vectors[ScaleShift.DORA].value if ScaleShift.DORA in vectors else 1.0
    for kind in (ScaleShift.BIAS, ScaleShift.LORA_BIAS):
        if kind in vectors:
            pair[1] += vectors[kind].value.float() * vectors[kind].scaling
    block = next(iter(vectors.values()))
    _check_finite(pair, target, f"layer {block.layer} {block.module}: magnitude or bias")
    for chunk in chunks:
        scale_shift_part(out, chunk).copy_(pair[:, chunk.col : chunk.col + chunk.columns])


def _pack_full_weight(
    block: Full | Rows, chunks: tuple[PanelPart, ...], target: PackTarget, out: torch.Tensor
) -> None:
    weight = block.weight.view(-1, block.weight.shape[-1])
    for i, chunk in enumerate(chunks):
        end = chunks[i + 1].row if i + 1 < len(chunks) else len(weight)
        part = weight[chunk.row : end].to(target.dtype)
        _check_finite(part, target, f"{block.module}: weight")
        place(out, target, chunk, end - chunk.row).copy_(part)


def place(out: torch.Tensor, target: PackTarget, chunk: PanelPart, rows: int) -> torch.Tensor:
    """Where a chunk lies, [rows, columns] in the target dtype. out: uint8 [pages, page_bytes]."""
    size = rows * chunk.columns * target.dtype.itemsize
    return out[chunk.page, chunk.offset : chunk.offset + size].view(target.dtype).view(rows, chunk.columns)


def scale_shift_part(out: torch.Tensor, chunk: PanelPart) -> torch.Tensor:
    """Where a chunk of a scale-shift pair lies: fp32 [2, columns], scale and shift."""
    size = 8 * chunk.columns
    return out[chunk.page, chunk.offset : chunk.offset + size].view(torch.float32).view(2, chunk.columns)


def _check_finite(weight: torch.Tensor, target: PackTarget, what: str) -> None:
    if not bool(weight.isfinite().all()):
        raise AdapterInvalid(f"{what}: a number is not finite in {target.dtype}")
