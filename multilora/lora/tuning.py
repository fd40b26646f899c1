"""Block sizes of the LoRA kernels, as data. They were found on an H200 by `bench/lora_sweep.py`; see docs/log.md."""

from dataclasses import dataclass, replace

GRAPH_ROWS = 256
"""Steps of up to this many rows take small grids that depend on nothing but the number of rows, and fixed buffers:
they can be captured in a CUDA graph. Larger steps (prefill) take exact grids, or larger fixed ones in a graph."""

DECODE_ROWS = 512
"""The same for captured steps of decodes, in which hardly any adapter has many rows."""

BESIDE_ROWS = 8
"""Captured steps of this many rows or more shrink beside the layer's own product, on a stream of their own. In
smaller steps it is faster to start early (programmatic dependent launch)."""

MEDIUM_ROWS = 65
"""From how many rows on steps of fixed small grids take the block sizes of `medium` instead of `small`."""

WIDE = 8192
"""Columns from which on the wide block sizes are taken."""


@dataclass(frozen=True)
class ShrinkBlocks:
    """k: input columns of a program (one split); tile_k, tile_r: columns and rank rows of one `tl.dot`; parts: how
    many programs share a tile's rank rows in small steps whose kernels do not start early."""

    k: int
    warps: int
    tile_k: int = 128
    tile_r: int = 16
    stages: int = 3
    registers: int | None = None  # per thread, at most
    parts: int = 1


@dataclass(frozen=True)
class ExpandBlocks:
    """n: output columns of a program; tile_n, tile_r: columns and rank rows of one `tl.dot`."""

    n: int
    warps: int
    tile_n: int = 128
    tile_r: int = 16
    stages: int = 3
    registers: int | None = None


def options_of(blocks: ShrinkBlocks | ExpandBlocks) -> dict[str, int]:
    """How Triton compiles a kernel with these block sizes."""
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return options if blocks.registers is None else options | {"maxnreg": blocks.registers}


@dataclass(frozen=True)
class Phase:
    """Block sizes by the width of what is read (shrink) or written (expand).

    gated: for gate and up expanded inside their activation, by columns of its result; None: they are expanded like
    every other site. In steps of fixed small grids, few_rows: so many rows of one adapter are still computed one by
    one, as single rows are; parts: the most programs that share a tile of several rows.
    """

    narrow_shrink: ShrinkBlocks
    wide_shrink: ShrinkBlocks
    narrow_expand: ExpandBlocks
    wide_expand: ExpandBlocks
    gated: ExpandBlocks | None = None
    few_rows: int = 4
    parts: int = 8

    def shrink(self, in_features: int) -> ShrinkBlocks:
        return self.wide_shrink if in_features >= WIDE else self.narrow_shrink

    def expand(self, out_features: int) -> ExpandBlocks:
        return self.wide_expand if out_features >= WIDE else self.narrow_expand


@dataclass(frozen=True)
class Tuning:
    """small: steps of fewer than MEDIUM_ROWS rows; medium: of up to GRAPH_ROWS, captured decodes of up to DECODE_ROWS
    (measured up to 256); large: the others. singles_apart: in
    large steps, single rows are launched apart, with the block sizes of small steps."""

    small: Phase
    medium: Phase
    large: Phase
    singles_apart: bool = False

    def of(self, num_rows: int) -> Phase:
        """The block sizes of a step of a fixed grid, of so many rows."""
        return self.small if num_rows < MEDIUM_ROWS else self.medium


LARGE = Phase(
    narrow_shrink=ShrinkBlocks(k=1024, warps=4, tile_r=64),
    wide_shrink=ShrinkBlocks(k=2048, warps=4, tile_r=64),
    narrow_expand=ExpandBlocks(n=1024, warps=4, tile_r=32, registers=128),
    wide_expand=ExpandBlocks(n=1024, warps=4, tile_r=32, registers=128),
)
SMALL = Phase(
    narrow_shrink=ShrinkBlocks(k=256, warps=4, registers=64, parts=2),
    wide_shrink=ShrinkBlocks(k=512, warps=4),
    narrow_expand=ExpandBlocks(n=1024, warps=4, registers=128),
    wide_expand=ExpandBlocks(n=1024, warps=4, registers=128),
)
TILES = Phase(
    narrow_shrink=ShrinkBlocks(k=512, warps=4),
    wide_shrink=ShrinkBlocks(k=512, warps=4),
    narrow_expand=ExpandBlocks(n=256, warps=4, tile_n=256),
    wide_expand=ExpandBlocks(n=256, warps=4, tile_n=256),
)
CSGMV = Tuning(
    small=SMALL,
    medium=replace(SMALL, narrow_shrink=ShrinkBlocks(k=512, warps=4, tile_r=32), few_rows=2),
    large=replace(LARGE, gated=ExpandBlocks(n=512, warps=4, tile_n=64, tile_r=32, registers=128)),
    singles_apart=True,
)
TRITON = Tuning(small=TILES, medium=TILES, large=LARGE)
