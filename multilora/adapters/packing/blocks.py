"""Packing: an adapter's blocks become the bytes of its pages, ready to copy to the device.

`lora/panels.py` decides the layout; here scalings are folded in, and the numbers are cast to the model's dtype and
written. What needs the base model's weights (DoRA's norms, differences of biases) is left to `loading/dora_bias.py`.
For ranks that share a model, each rank's pages are packed from its cut of the blocks (`cut.py`), one rank's after the
other's. It knows neither files nor the device. Called by `loading/loader.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    make_layout,
    round_rank,
)
from multilora.lora.sharding import local_sites
from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice

SCALE_SHIFT_OF = {
    VectorKind.MAGNITUDE: ScaleShift.DORA,
    VectorKind.BIAS: ScaleShift.BIAS,
    VectorKind.LORA_BIAS: ScaleShift.LORA_BIAS,
}


@dataclass(frozen=True)
class PackTarget:
    """What adapters are packed for: the sites of each of `ranks` ranks, dtype and page size of one engine."""

    sites: tuple[LoraSite, ...]
    dtype: torch.dtype
    page_bytes: int
    ranks: int = 1

    @classmethod
    def of(cls, sites: tuple[LoraSite, ...], dtype: torch.dtype, page_bytes: int, ranks: int) -> "PackTarget":
        """For ranks that divide the whole model's `sites` among them."""
        return cls(local_sites(sites, ranks), dtype, page_bytes, ranks)

    @property
    def geometry(self) -> PanelGeometry:
        return PanelGeometry(self.page_bytes, self.dtype.itemsize)

    def layout(self, shape: AdapterShape) -> PanelLayout:
        """The layout of an adapter. Raises AdapterIncompatible if one row of a full weight is larger than a page."""
        try:
            return make_layout(self.sites, shape, self.geometry)
        except ValueError as e:
            raise AdapterIncompatible(f"incompatible: {e}; start with a larger --page-size") from None


ModuleKey = tuple[int, str]
"""Layer and module."""


@dataclass(frozen=True)
class Blocks:
    """An adapter's blocks by the module they act on; `full_weights` are in the order of the shape's."""

    low_rank: dict[ModuleKey, LowRank]
    vectors: dict[ModuleKey, dict[ScaleShift, Vector]]
    full_weights: list[Full | Rows]

    @classmethod
    def of(cls, adapter: Adapter) -> "Blocks":
        """The blocks of `adapter`."""
        vectors: dict[ModuleKey, dict[ScaleShift, Vector]] = {}
        for block in adapter.blocks:
            if isinstance(block, Vector):
                vectors.setdefault((block.layer, block.module), {})[SCALE_SHIFT_OF[block.kind]] = block
        return cls(
            {(b.layer, b.module): b for b in adapter.blocks if isinstance(b, LowRank)},
            vectors,
            [b for b in adapter.blocks if isinstance(b, Full | Rows)],
        )

    def shape(self, sites: tuple[LoraSite, ...]) -> AdapterShape:
        """What decides their layout over these sites."""
        ranks = tuple(tuple(self._rank(site, s) for s in site.slices) for site in sites)
        scale_shift: tuple[tuple[int, ...], ...] = ()
        if self.vectors:
            scale_shift = tuple(tuple(self._scale_shift(site, s) for s in site.slices) for site in sites)
        full_weights = tuple(_full_weight_shape(b) for b in self.full_weights)
        return AdapterShape(ranks, scale_shift, full_weights, frozenset(self._shared(sites)))

    def _shared(self, sites: tuple[LoraSite, ...]) -> Iterator[tuple[int, int]]:
        """The matrices that all experts of a site share, as `AdapterShape` has them."""
        for site in sites:
            block = self.low_rank.get((site.layer, site.slices[0].module)) if site.experts > 1 else None
            if block is not None:
                yield from ((site.index, i) for i, x in ((-1, block.a), (0, block.b)) if len(x) == 1)

    def _rank(self, site: LoraSite, output: LoraSlice) -> int:
        block = self.low_rank.get((site.layer, output.module))
        return block.rank if block else 0

    def _scale_shift(self, site: LoraSite, output: LoraSlice) -> int:
        return int(sum(self.vectors.get((site.layer, output.module), ())))


def _full_weight_shape(block: Full | Rows) -> FullWeightShape:
    rows = block.weight.shape[0] if block.weight.ndim == 2 else 1
    if isinstance(block, Rows):
        return FullWeightShape(MODEL_LEVEL, block.module, rows, block.weight.shape[-1], block.token_ids)
    return FullWeightShape(block.layer, block.module, rows, block.weight.shape[-1])


WriteJobs = Callable[[list[PackJob], torch.dtype, torch.Tensor], None]
"""(jobs, target dtype, pages): see `pack_jobs.write_jobs`."""


def pack(
    ranks: Sequence[Blocks],
    target: PackTarget,
    layout: PanelLayout,
    out: torch.Tensor,
    write: WriteJobs = write_jobs,
) -> list[PackJob]:
    """Write the pages of an adapter into `out`, uint8 [ranks · layout.num_pages, page_bytes], which must be zero.
    Returns what of it was done by `write`.

    ranks: the blocks as each rank has them, all of one layout. A scale-shift pair is written unfinished: the
    magnitude (or 1), and the trained bias plus lora_B's (or 0). Raises AdapterInvalid if a weight is not finite in
    the target dtype.
    """
    jobs: list[PackJob] = []
    for rank, blocks in enumerate(ranks):
        first = rank * layout.num_pages
        _pack_at_once(blocks, target, layout, out[first : first + layout.num_pages])
        for plan in _job_plans(target.sites, layout.shape, target.geometry, first):
            block = blocks.low_rank[plan.key]
            weight, scaling = (block.b, block.scaling) if plan.is_b else (block.a, 1.0)
            jobs.append(PackJob(plan.name, weight.reshape(-1, weight.shape[-1]), scaling, plan.spans))
    write(jobs, target.dtype, out)
    return jobs


def _pack_at_once(blocks: Blocks, target: PackTarget, layout: PanelLayout, out: torch.Tensor) -> None:
    """What is no job: scale-shift pairs and full weights of one rank, into its pages."""
    for matrix, parts in zip(layout.matrices, layout.parts, strict=True):
        if matrix.scale_shift:
            site = target.sites[matrix.site]
            _pack_scale_shift(blocks.vectors[site.layer, site.slices[matrix.slice].module], parts, target, out)
    for full, parts in zip(blocks.full_weights, layout.full_weights, strict=True):
        _pack_full_weight(full, parts, target, out)


@dataclass(frozen=True)
class _JobPlan:
    """Where one weight goes. It depends on the adapter's shape only, so adapters of one shape share it."""

    key: ModuleKey
    is_b: bool
    name: str
    spans: tuple[Span, ...]


@lru_cache(maxsize=16)
def _job_plans(
    sites: tuple[LoraSite, ...], shape: AdapterShape, geometry: PanelGeometry, first_page: int
) -> tuple[_JobPlan, ...]:
    layout = make_layout(sites, shape, geometry)
    plans: list[_JobPlan] = []
    for matrix, parts in zip(layout.matrices, layout.parts, strict=True):
        if not matrix.scale_shift:
            moved = tuple(replace(part, page=first_page + part.page) for part in parts) if first_page else parts
            plans += _plans_of(matrix, moved, sites[matrix.site], shape, geometry)
    return tuple(plans)


def _plans_of(
    matrix: Matrix, parts: tuple[PanelPart, ...], site: LoraSite, shape: AdapterShape, geometry: PanelGeometry
) -> Iterator[_JobPlan]:
    """One plan for the B of a slice; for the stacked A, one for each slice that has a rank."""
    cuts = len(parts) * RANK_GRANULE // (matrix.copies * matrix.rank)  # parts of one panel
    is_b, at = matrix.slice >= 0, 0
    for i, output in enumerate(site.slices):
        rank = shape.ranks[site.index][i]
        if rank == 0 or (is_b and i != matrix.slice):
            continue
        end = at + round_rank(rank) // RANK_GRANULE * cuts
        spans: tuple[Span, ...] = ()
        for copy in range(matrix.copies):  # of an expert each; one slice is all that such a site has
            first = copy * end
            own = spans_of(rank, parts[first + at : first + end], geometry.page_bytes, geometry.itemsize)
            spans += tuple(replace(span, row=copy * rank + span.row) for span in own) if copy else own
        name = f"layer {site.layer} {output.module} lora_{'B' if is_b else 'A'}"
        yield _JobPlan((site.layer, output.module), is_b, name, spans)
        at = end


def _pack_scale_shift(
    vectors: dict[ScaleShift, Vector], parts: tuple[PanelPart, ...], target: PackTarget, out: torch.Tensor
) -> None:
    width = next(iter(vectors.values())).value.numel()
    pair = torch.zeros(2, width)
    pair[0] = vectors[ScaleShift.DORA].value if ScaleShift.DORA in vectors else 1.0
    for kind in (ScaleShift.BIAS, ScaleShift.LORA_BIAS):
        if kind in vectors:
            pair[1] += vectors[kind].value.float() * vectors[kind].scaling
    block = next(iter(vectors.values()))
    _check_finite(pair, target, f"layer {block.layer} {block.module}: magnitude or bias")
    for part in parts:
        scale_shift_view(out, part).copy_(pair[:, part.col : part.col + part.columns])


def _pack_full_weight(
    block: Full | Rows, parts: tuple[PanelPart, ...], target: PackTarget, out: torch.Tensor
) -> None:
    weight = block.weight.view(-1, block.weight.shape[-1])
    for i, part in enumerate(parts):
        end = parts[i + 1].row if i + 1 < len(parts) else len(weight)
        rows = weight[part.row : end].to(target.dtype)
        _check_finite(rows, target, f"{block.module}: weight")
        part_view(out, target, part, end - part.row).copy_(rows)


def part_view(out: torch.Tensor, target: PackTarget, part: PanelPart, rows: int) -> torch.Tensor:
    """The memory of a part, [rows, columns] in the target dtype. out: uint8 [pages, page_bytes]."""
    size = rows * part.columns * target.dtype.itemsize
    return out[part.page, part.offset : part.offset + size].view(target.dtype).view(rows, part.columns)


def scale_shift_view(out: torch.Tensor, part: PanelPart) -> torch.Tensor:
    """The memory of a part of a scale-shift pair: fp32 [2, columns], scale and shift. out: as for `part_view`."""
    size = 8 * part.columns
    return out[part.page, part.offset : part.offset + size].view(torch.float32).view(2, part.columns)


def _check_finite(weight: torch.Tensor, target: PackTarget, what: str) -> None:
    if not bool(weight.isfinite().all()):
        raise AdapterInvalid(f"{what}: a number is not finite in {target.dtype}")
