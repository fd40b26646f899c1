"""Random adapters in an arena, and LoRA backends held against the reference on them.

For the tests of the Triton backends: interpreted on CPU (fp32, fp16), compiled where there is a GPU (bf16 too).
"""

from dataclasses import replace

import pytest
import torch

from multilora.batch import LoraSegment
from multilora.lora.panels import AdapterShape, PanelGeometry, make_layout
from multilora.lora.reference import ReferenceLora
from multilora.lora.table import LoraTable
from multilora.lora.triton_backend import TritonLora
from multilora.lora.tuning import ExpandBlocks, Phase, ShrinkBlocks, Tuning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU_ONLY = pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter's bf16 dot is wrong")
INTERPRETED_SLOW = pytest.mark.slow if DEVICE.type == "cpu" else ()
"""Kernels whose other variants are interpreted in the quick tier."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

SMALL = Phase(
    narrow_shrink=ShrinkBlocks(k=32, warps=4, tile_k=16),
    wide_shrink=ShrinkBlocks(k=32, warps=4, tile_k=16),
    narrow_expand=ExpandBlocks(n=32, warps=4, tile_n=16),
    wide_expand=ExpandBlocks(n=32, warps=4, tile_n=16),
)
LARGE = replace(SMALL, gated=ExpandBlocks(n=32, warps=4, tile_n=16))
BLOCKS = Tuning(SMALL, replace(SMALL, few_rows=1), LARGE, singles_apart=True)
"""They are small, so that small sites have several splits and blocks."""


class World:
    """Adapters of these ranks (per site, per slice) with random weights in scattered pages of an arena."""

    def __init__(self, sites, ranks, *, scale_shift=None, dtype=torch.float32, page_bytes=65536, spare_pages=3):
        """scale_shift: per adapter, which slices of which sites have a pair, as `ranks`; () for none at all."""
        self.sites, self.dtype = sites, dtype
        self.geometry = PanelGeometry(page_bytes, dtype.itemsize)
        shapes = [AdapterShape(*parts) for parts in zip(ranks, scale_shift or [()] * len(ranks), strict=True)]
        self.layouts = [make_layout(sites, shape, self.geometry) for shape in shapes]
        total = sum(layout.num_pages for layout in self.layouts) + spare_pages
        g = torch.Generator().manual_seed(0)
        self.free = torch.randperm(total, generator=g).tolist()
        weights = torch.randn(total, page_bytes // dtype.itemsize, generator=g) / 8
        arena = weights.to(dtype).view(torch.uint8).to(DEVICE)
        self.table = LoraTable(arena, dtype, tuple(tuple(s.offset for s in site.slices) for site in sites))
        self.reference = ReferenceLora(self.table)

    def install(self, slot, which=None):
        layout = self.layouts[slot if which is None else which]
        self.table.install(slot, layout, [self.free.pop() for _ in range(layout.num_pages)])
        g = torch.Generator().manual_seed(slot)
        weights = [self.table.site(slot, site.index) for site in self.sites]
        for piece in (piece for site in weights if site for part in site.b for piece in part.scale_shift):
            scale = torch.rand(piece.weight.shape[1], generator=g) + 0.5
            piece.weight.copy_(torch.stack((scale, torch.randn(len(scale), generator=g))))

    def backend(self, name="csgmv", **options):
        return TritonLora(self.table, self.sites, name=name, tuning=BLOCKS, **options)

    def check(self, backend, segments, num_rows, seed=0, y_dtype=None, *, captured=False):
        """Both from the same random rows; the answers of the backend."""
        g = torch.Generator().manual_seed(seed)
        for lora in (backend, self.reference):
            lora.prepare(segments, num_rows, captured=captured)
        answers = []
        for site in self.sites:
            x = torch.randn(num_rows, site.in_features, generator=g).to(DEVICE, self.dtype)
            y = torch.randn(num_rows, site.out_features, generator=g).to(DEVICE, y_dtype or self.dtype)
            got, want = y.clone(), y.to(torch.float32)
            backend.apply(got, x, site.index)
            self.reference.apply(want, x.to(torch.float32), site.index)
            assert (got.float() - want).norm() / want.norm() < TOLERANCE[self.dtype]
            covered = torch.zeros(num_rows, dtype=torch.bool)
            for s in segments:
                covered[s.start : s.end] = True
            assert torch.equal(got[~covered], y[~covered])  # base rows: not a bit
            answers.append(got)
        return answers


def same_rank(sites, rank):
    return tuple(tuple(rank for _ in site.slices) for site in sites)


def segments_of(*parts):
    return tuple(LoraSegment(start, end, (slot,), (1.0,)) for start, end, slot in parts)
