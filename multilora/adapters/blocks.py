"""Packing: an adapter's blocks become the bytes of its pages, ready to copy.

The layout is `lora/panels.py`'s; here the numbers are cast to the model's dtype and put in their place.
Called in the loader process; knows neither files nor the device.
"""

from dataclasses import dataclass

import torch

from multilora.adapters.adapter import Adapter, LowRank
from multilora.errors import AdapterInvalid
from multilora.lora.panels import RANK_GRANULE, PanelGeometry, PanelLayout, Ranks, place_panels
from multilora.lora.sites import LoraSite


@dataclass(frozen=True)
class PackTarget:
    """What adapters are packed for: the sites, dtype and page size of one engine."""

    sites: tuple[LoraSite, ...]
    dtype: torch.dtype
    page_bytes: int

    @property
    def geometry(self) -> PanelGeometry:
        return PanelGeometry(self.page_bytes, self.dtype.itemsize)

    def layout(self, ranks: Ranks) -> PanelLayout:
        return place_panels(self.sites, ranks, self.geometry)


Blocks = dict[tuple[int, str], LowRank]  # (layer, module) → block


def index_blocks(adapter: Adapter) -> Blocks:
    return {(block.layer, block.module): block for block in adapter.blocks}


def ranks_of(blocks: Blocks, sites: tuple[LoraSite, ...]) -> Ranks:
    """Per site, the true rank of each slice; 0 where the adapter does not act."""
    return tuple(
        tuple(block.rank if (block := blocks.get((site.layer, s.module))) else 0 for s in site.slices)
        for site in sites
    )


def pack(blocks: Blocks, target: PackTarget, layout: PanelLayout, out: torch.Tensor) -> None:
    """Write the adapter's pages into `out`, uint8 [layout.num_pages, page_bytes], which must be zero.

    Raises AdapterInvalid if a weight is not finite in the target dtype.
    """
    pages = out.view(-1).view(target.dtype)
    page_elements = target.page_bytes // target.dtype.itemsize
    for matrix, chunks in zip(layout.matrices, layout.chunks, strict=True):
        rows = _stacked_rows(blocks, target.sites[matrix.site], matrix.slice, target.dtype)
        for chunk in chunks:
            weight, row = rows[chunk.row // RANK_GRANULE]
            part = weight[row : row + RANK_GRANULE, chunk.col : chunk.col + chunk.columns]
            at = chunk.page * page_elements + chunk.offset // target.dtype.itemsize
            panel = pages[at : at + RANK_GRANULE * chunk.columns].view(RANK_GRANULE, chunk.columns)
            panel[: len(part)] = part


def _stacked_rows(blocks: Blocks, site: LoraSite, index: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, int]]:
    """For each panel of a matrix (slice `index`, or -1 for the stacked A): its weight [rank, width] and first row."""
    modules = [s.module for s in site.slices] if index < 0 else [site.slices[index].module]
    panels = []
    for module in modules:
        block = blocks.get((site.layer, module))
        if block is None:
            continue
        weight = (block.a if index < 0 else block.b).to(dtype)
        # A sum of finite numbers is finite unless it overflows: the slower test runs only where it must.
        if not weight.sum(dtype=torch.float32).isfinite() and not bool(weight.isfinite().all()):
            half = "lora_A" if index < 0 else "lora_B"
            raise AdapterInvalid(f"layer {site.layer} {module} {half}: a weight is not finite in {dtype}")
        panels += [(weight, row) for row in range(0, block.rank, RANK_GRANULE)]
    return panels
