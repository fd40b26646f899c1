"""The LoRA backends of Triton: `csgmv`, and `triton`, which takes the tile path for everything.

Host side only: tiles of the step to the device, then two launches a site. Owns the intermediate and the tables of the
step; for up to GRAPH_ROWS rows both are fixed, so a captured graph over N rows serves every later step of N rows:
prepare(), then replay. In larger steps single rows shrink as tiles do, and nothing starts early.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from multilora.batch import LoraSegment
from multilora.lora.device_table import DeviceTable, upload
from multilora.lora.sites import LoraSite
from multilora.lora.table import LoraTable
from multilora.lora.triton_kernels import BLOCK_WORDS, ENTRY_WORDS, TILE_WORDS, expand_kernel, shrink_kernel
from multilora.lora.triton_steps import make_tiles
from multilora.lora.tuning import BESIDE_ROWS, CSGMV, GRAPH_ROWS, TRITON, ExpandBlocks, Phase, ShrinkBlocks, Tuning
from multilora.triton_launch import can_launch_early, launch

H_BYTES = 64 << 20
"""The fixed intermediate: room for 64 rows of stacked rank 9,000, in 28 splits."""

H_ALIGN = 16

MIN_TILE = 16
"""The least rows and rank rows that `tl.dot` takes; the rows of a tile in a small step."""

MAX_TILE_ROWS = 32
"""Tiles of 64 rows need more registers than there are: 8 to 50 % slower on an H200."""

MAX_PARTS = 8
"""How many programs share a tile of several rows where the grid has room for them."""

FURTHER = 256
"""Further adapters of composed rows that the fixed tables hold."""

MAX_RANK = 1 << 15


@dataclass(frozen=True)
class Step:
    """What the launches of one step need. h: fp32, flat. use: see `DeviceTable.used_sites`; None: any adapters may
    come, the launches are being captured."""

    small: bool
    grid: int  # programs along the tiles
    overlap: bool  # kernels start early
    beside: bool  # shrink runs beside the layer's own product
    use: list[list[int]] | None
    tile_rows: int
    blocks: Phase
    tiles: torch.Tensor
    entries: torch.Tensor
    h: torch.Tensor

    def rank(self, site: int, stacked: bool) -> int:
        """The largest rank at a site, stacked or of a slice; MAX_RANK if anything may come."""
        return MAX_RANK if self.use is None else self.use[0 if stacked else 1][site]

    def touches(self, site: int) -> bool:
        return self.use is None or bool(self.use[2][site])

    def tile_r(self, most: int, rank: int) -> int:
        """Rank rows of one `tl.dot`. In a small step always `most`: its graph serves every rank."""
        return most if self.small else max(MIN_TILE, min(most, power_of_two(rank)))

    def options(self, blocks: ShrinkBlocks | ExpandBlocks) -> dict[str, int]:
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        return options if blocks.registers is None else options | {"maxnreg": blocks.registers}


@dataclass(frozen=True)
class Columns:
    """How the output columns of a site are shared out. table: int32 [blocks, 8], see `expand_kernel`; whole: no panel
    is cut; align: of all widths and offsets, in columns."""

    table: torch.Tensor
    whole: bool
    align: int


class TritonLora:
    """The contract of `lora/base.py` with kernels. chunk_rows: most rows of a tile of a large step."""

    def __init__(
        self,
        table: LoraTable,
        sites: tuple[LoraSite, ...],
        *,
        name: str = "csgmv",
        chunk_rows: int = MAX_TILE_ROWS,
        tuning: Tuning | None = None,
        graph_rows: int = GRAPH_ROWS,
    ):
        self.name = name
        self.tuning = tuning or (CSGMV if name == "csgmv" else TRITON)
        self._vector = name == "csgmv"
        self._table = DeviceTable(table, sites)
        self._applied = [site for site in sites if site.name != "embed_tokens"]  # that one's input is no matrix
        self._device = table.weights.device
        self._chunk_rows = min(chunk_rows, MAX_TILE_ROWS)
        self._graph_rows = graph_rows
        self.overlap = can_launch_early(self._device)
        """Programmatic dependent launch, in small steps: a kernel starts while the one before it ends."""
        self._align = math.gcd(table.page_elements, 8)
        self._columns: dict[tuple[int, int], Columns] = {}
        words = FURTHER * ENTRY_WORDS + graph_rows * TILE_WORDS
        self._fixed = torch.zeros(words, dtype=torch.int32, device=self._device)
        self._fixed_h = torch.zeros(H_BYTES // 4, dtype=torch.float32, device=self._device)
        self._step: Step | None = None
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._begun = False
        self.replayable = False
        """Whether a graph captured over as many rows may be replayed for the step last prepared."""

    def prepare(self, segments: tuple[LoraSegment, ...], num_rows: int) -> None:
        small = num_rows <= self._graph_rows
        tile_rows = MIN_TILE if small else self._chunk_rows
        tiles = make_tiles(segments, tile_rows, self._table.stacked_rank, MAX_PARTS if small else 1)
        blocks = self.tuning.small if small else self.tuning.large
        h = self._fixed_h
        need = self._h_split(tiles.h_size) * max(self._splits(blocks, site) for site in self._applied)
        fits = need <= len(h)
        if not fits:
            h = torch.empty(need, dtype=torch.float32, device=self._device)
        self.replayable = small and fits and len(tiles.entries) <= FURTHER
        grid = num_rows if small else len(tiles.tiles)
        further = FURTHER if self.replayable else cdiv(len(tiles.entries), 2) * 2  # tiles stay 16-byte aligned
        at = further * ENTRY_WORDS
        words = np.zeros(at + grid * TILE_WORDS, np.int32)
        words[: tiles.entries.size] = tiles.entries.ravel()
        words[at : at + tiles.tiles.size] = tiles.tiles.ravel()
        on_device = (
            self._fixed if self.replayable else torch.empty(len(words), dtype=torch.int32, device=self._device)
        )
        upload(words, on_device[: len(words)])
        places = {place for s in segments for place in s.places}
        use = self._table.used_sites(places).tolist() if places else None
        beside = self._side is not None and use is None and small and num_rows >= BESIDE_ROWS
        overlap = self.overlap and small and not beside
        self._step = Step(small, grid, overlap, beside, use, tile_rows, blocks, on_device[at:], on_device[:at], h)

    def begin(self) -> None:
        assert self._step is not None
        if self._step.beside and self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            self._begun = True

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        if self._begun and self._side is not None:
            self._begun = False
            with torch.cuda.stream(self._side):
                self.shrink(x, site)
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        else:
            self.shrink(x, site)
        self.expand(y, site)

    def shrink(self, x: torch.Tensor, site: int) -> None:
        """The first half: reads x, writes the intermediate."""
        assert self._step is not None and x.is_contiguous()
        step, table, shape = self._step, self._table, self._table.sites[site]
        rank = step.rank(site, stacked=True)
        if not rank:
            return
        blocks, splits = step.blocks.shrink(shape.in_features), self._splits(step.blocks, shape)
        chunk = table.geometry.chunk_columns(shape.in_features)
        tables = table.weights, table.addresses, table.records, step.tiles, step.entries
        args = (x, step.h, *tables, site, len(table.sites), shape.in_features, chunk, self._h_stride(splits))
        constants = {
            "RECORD": table.record_words,
            "WHOLE": chunk == shape.in_features,
            "ALIGN": self._align,
            "VECTOR": self._vector and step.small,
            "BLOCK_K": blocks.k,
            "TILE_M": step.tile_rows,
            "TILE_K": min(blocks.tile_k, blocks.k),
            "TILE_R": step.tile_r(blocks.tile_r, rank),
            "PDL": step.overlap,
        }
        launch(shrink_kernel, (step.grid, splits), args, constants, early=step.overlap, **step.options(blocks))

    def expand(self, y: torch.Tensor, site: int) -> None:
        """The second half: adds what shrink() of the same site prepared."""
        assert self._step is not None and y.is_contiguous()
        step, table, shape = self._step, self._table, self._table.sites[site]
        if not step.touches(site):
            return
        blocks, splits = step.blocks.expand(shape.out_features), self._splits(step.blocks, shape)
        columns = self._columns_of(shape, blocks.n)
        tables = table.weights, table.addresses, table.records, step.tiles, step.entries, columns.table
        args = (y, step.h, *tables, site, len(table.sites), y.shape[1], self._h_stride(splits), splits)
        constants = {
            "RECORD": table.record_words,
            "WHOLE": columns.whole,
            "ALIGN": self._align,
            "ALIGN_N": columns.align,
            "VECTOR": self._vector,
            "BLOCK_N": blocks.n,
            "BLOCK_S": power_of_two(splits),
            "TILE_M": step.tile_rows,
            "TILE_N": min(blocks.tile_n, blocks.n),
            "TILE_R": step.tile_r(blocks.tile_r, step.rank(site, stacked=False)),
            "PDL": step.overlap,
        }
        grid = step.grid, columns.table.shape[0]
        launch(expand_kernel, grid, args, constants, early=step.overlap, **step.options(blocks))

    def _h_stride(self, splits: int) -> int:
        """From one split of the intermediate to the next."""
        assert self._step is not None
        return self._step.h.shape[0] // splits // H_ALIGN * H_ALIGN

    @staticmethod
    def _splits(blocks: Phase, site: LoraSite) -> int:
        return cdiv(site.in_features, blocks.shrink(site.in_features).k)

    @staticmethod
    def _h_split(size: int) -> int:
        return cdiv(size, H_ALIGN) * H_ALIGN

    def _columns_of(self, site: LoraSite, block_n: int) -> Columns:
        key = site.index, block_n
        if key not in self._columns:
            geometry, widths = self._table.geometry, [s.out_features for s in site.slices]
            rows = [
                (i, col, s.out_features, s.offset, geometry.chunk_columns(s.out_features), 0, 0, 0)
                for i, s in enumerate(site.slices)
                for col in range(0, s.out_features, block_n)
            ]
            assert len(rows[0]) == BLOCK_WORDS
            self._columns[key] = Columns(
                torch.tensor(rows, dtype=torch.int32, device=self._device),
                whole=all(geometry.chunks(w) == 1 for w in widths),
                align=math.gcd(16, *widths, *(s.offset for s in site.slices)),
            )
        return self._columns[key]


def cdiv(a: int, b: int) -> int:
    """Rounded up. (Triton's own takes ten times as long on the host.)"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The next one, 1 for 0."""
    return 1 << max(0, n - 1).bit_length()
