"""Packing: an adapter's blocks become the bytes of its pages, ready to copy.

The layout is `lora/panels.py`'s; here scalings are folded in, the numbers are cast to the model's dtype and put in
their place. What needs the base model's weights (norms of DoRA, differences of biases) is left to `finish.py`.
Called in the loader process; knows neither files nor the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from multilora.adapters.adapter import Adapter, Full, LowRank, Rows, Vector, VectorKind
from multilora.adapters.strips import Strip, runs_of, write_strips
from multilora.errors import AdapterIncompatible, AdapterInvalid
from multilora.lora.panels import (
    RANK_GRANULE,
    AdapterShape,
    Affine,
    Chunk,
    Matrix,
    PanelGeometry,
    PanelLayout,
    WholeShape,
    place_panels,
    round_rank,
)
from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice

AFFINE_OF = {
    VectorKind.MAGNITUDE: Affine.DORA,
    VectorKind.BIAS: Affine.BIAS,
    VectorKind.LORA_BIAS: Affine.LORA_BIAS,
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
    """An adapter's blocks by where they act. `whole` is in the order of the shape."""

    low_rank: dict[Key, LowRank]
    vectors: dict[Key, dict[Affine, Vector]]
    whole: list[Full | Rows]

    @classmethod
    def of(cls, adapter: Adapter) -> "Blocks":
        vectors: dict[Key, dict[Affine, Vector]] = {}
        for block in adapter.blocks:
            if isinstance(block, Vector):
                vectors.setdefault((block.layer, block.module), {})[AFFINE_OF[block.kind]] = block
        return cls(
            {(b.layer, b.module): b for b in adapter.blocks if isinstance(b, LowRank)},
            vectors,
            [b for b in adapter.blocks if isinstance(b, Full | Rows)],
        )

    def shape(self, sites: tuple[LoraSite, ...]) -> AdapterShape:
        ranks = tuple(tuple(self._rank(site, s) for s in site.slices) for site in sites)
        affine = tuple(tuple(self._affine(site, s) for s in site.slices) for site in sites) if self.vectors else ()
        return AdapterShape(ranks, affine, tuple(_whole_shape(b) for b in self.whole))

    def _rank(self, site: LoraSite, part: LoraSlice) -> int:
        block = self.low_rank.get((site.layer, part.module))
        return block.rank if block else 0

    def _affine(self, site: LoraSite, part: LoraSlice) -> int:
        return int(sum(self.vectors.get((site.layer, part.module), ())))


def _whole_shape(block: Full | Rows) -> WholeShape:
    rows = block.weight.shape[0] if block.weight.ndim == 2 else 1
    if isinstance(block, Rows):
        return WholeShape(MODEL_LEVEL, block.module, rows, block.weight.shape[-1], block.token_ids)
    return WholeShape(block.layer, block.module, rows, block.weight.shape[-1])


WriteStrips = Callable[[list[Strip], torch.dtype, torch.Tensor], None]


def pack(
    blocks: Blocks, target: PackTarget, layout: PanelLayout, out: torch.Tensor, write: WriteStrips = write_strips
) -> None:
    """Write the adapter's pages into `out`, uint8 [layout.num_pages, page_bytes], which must be zero.

    An affine pair is written unfinished: the magnitude (or 1), and the trained bias plus the one of lora_B (or 0).
    Raises AdapterInvalid if a weight is not finite in the target dtype.
    """
    strips: list[Strip] = []
    for matrix, chunks in zip(layout.matrices, layout.chunks, strict=True):
        site = target.sites[matrix.site]
        if matrix.affine:
            _pack_affine(blocks.vectors[site.layer, site.slices[matrix.slice].module], chunks, target, out)
        else:
            strips += _strips(blocks, site, matrix, chunks, target)
    for block, chunks in zip(blocks.whole, layout.whole, strict=True):
        _pack_whole(block, chunks, target, out)
    write(strips, target.dtype, out)


def _strips(
    blocks: Blocks, site: LoraSite, matrix: Matrix, chunks: tuple[Chunk, ...], target: PackTarget
) -> Iterator[Strip]:
    """Of the B of a slice, or of the stacked A: one for each slice that has some."""

    def strip(block: LowRank, weight: torch.Tensor, half: str, scaling: float, chunks: tuple[Chunk, ...]) -> Strip:
        runs = runs_of(block.rank, chunks, target.page_bytes, target.dtype.itemsize)
        return Strip(f"layer {site.layer} {block.module} {half}", weight, scaling, runs)

    if matrix.slice >= 0:
        block = blocks.low_rank[site.layer, site.slices[matrix.slice].module]
        yield strip(block, block.b, "lora_B", block.scaling, chunks)
        return
    cuts = len(chunks) * RANK_GRANULE // matrix.rank  # of one panel
    at = 0
    for part in site.slices:
        if (site.layer, part.module) in blocks.low_rank:
            block = blocks.low_rank[site.layer, part.module]
            end = at + round_rank(block.rank) // RANK_GRANULE * cuts
            yield strip(block, block.a, "lora_A", 1.0, chunks[at:end])
            at = end


def _pack_affine(
    vectors: dict[Affine, Vector], chunks: tuple[Chunk, ...], target: PackTarget, out: torch.Tensor
) -> None:
    width = next(iter(vectors.values())).value.numel()
    pair = torch.zeros(2, width)
    pair[0] = vectors[Affine.DORA].value if Affine.DORA in vectors else 1.0
    for kind in (Affine.BIAS, Affine.LORA_BIAS):
        if kind in vectors:
            pair[1] += vectors[kind].value.float() * vectors[kind].scaling
    block = next(iter(vectors.values()))
    _check_finite(pair, target, f"layer {block.layer} {block.module}: magnitude or bias")
    for chunk in chunks:
        affine_place(out, chunk).copy_(pair[:, chunk.col : chunk.col + chunk.columns])


def _pack_whole(block: Full | Rows, chunks: tuple[Chunk, ...], target: PackTarget, out: torch.Tensor) -> None:
    weight = block.weight.view(-1, block.weight.shape[-1])
    for i, chunk in enumerate(chunks):
        end = chunks[i + 1].row if i + 1 < len(chunks) else len(weight)
        part = weight[chunk.row : end].to(target.dtype)
        _check_finite(part, target, f"{block.module}: weight")
        place(out, target, chunk, end - chunk.row).copy_(part)


def place(out: torch.Tensor, target: PackTarget, chunk: Chunk, rows: int) -> torch.Tensor:
    """Where a chunk lies, [rows, columns] in the target dtype. out: uint8 [pages, page_bytes]."""
    size = rows * chunk.columns * target.dtype.itemsize
    return out[chunk.page, chunk.offset : chunk.offset + size].view(target.dtype).view(rows, chunk.columns)


def affine_place(out: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Where a chunk of an affine pair lies: fp32 [2, columns], scale and shift."""
    size = 8 * chunk.columns
    return out[chunk.page, chunk.offset : chunk.offset + size].view(torch.float32).view(2, chunk.columns)


def _check_finite(weight: torch.Tensor, target: PackTarget, what: str) -> None:
    if not bool(weight.isfinite().all()):
        raise AdapterInvalid(f"{what}: a number is not finite in {target.dtype}")
