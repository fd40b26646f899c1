"""The LoRA backends of Triton: `csgmv`, and `triton`, which takes the tile path for everything.

This is the host side: it copies the tiles of the step to the device, then makes two launches per site. It owns the
intermediate and the tables of the step. For up to GRAPH_ROWS rows, and captured decodes of up to DECODE_ROWS, both
are fixed, so a graph captured over N rows serves every later step of N rows: prepare(), then replay. Called by
`backends.py`.

    words of the step    entries | tiles                                 up to GRAPH_ROWS rows
                         entries | tiles | base rows | single rows       larger steps
                                   `----- gated ----'

In larger steps nothing starts early, and grids are exact, but for those that are captured: there they have room for
as many segments as CAPTURED_SEGMENTS and single rows as CAPTURED_SINGLES, and tables and intermediate are fixed, too.
With csgmv, single rows (decodes among prompts) are a group
of their own there, launched with the block sizes of small steps, and gate and up are expanded inside their
activation. That kernel sees single rows as base rows: their adapters have been added to y before.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from multilora.batch import ExpertRows
from multilora.kernels.integers import cdiv, power_of_two
from multilora.kernels.triton_launch import Repeated, can_launch_early
from multilora.kernels.triton_math import fast_silu
from multilora.lora.base import Activation
from multilora.lora.device_table import DeviceTable
from multilora.lora.sites import EMBED, LoraSite
from multilora.lora.table import LoraTable
from multilora.lora.triton_experts import ExpertLora
from multilora.lora.triton_gated import gated_kernel
from multilora.lora.triton_kernels import BLOCK_WORDS, expand_kernel, shrink_kernel
from multilora.lora.triton_panels import ENTRY_WORDS, TILE_WORDS
from multilora.lora.triton_steps import (
    CAPTURED_SINGLES,
    FURTHER,
    H_ALIGN,
    MIN_TILE,
    CapturedTables,
    LaunchGroup,
    Segments,
    Step,
    StepTiles,
    base_tiles,
    in_single_rows,
    make_tiles,
    split_singles,
    splits_of,
)
from multilora.lora.tuning import BESIDE_ROWS, CSGMV, DECODE_ROWS, GRAPH_ROWS, TRITON, Phase, Tuning, options_of
from multilora.transfer import upload_into

H_BYTES = 64 << 20
"""The fixed intermediate: room for 64 rows of stacked rank 9,000, in 28 splits."""

MAX_TILE_ROWS = 32
"""Tiles of 64 rows need more registers than there are: 8 to 50 % slower on an H200."""


@dataclass(frozen=True)
class Columns:
    """How the output columns of a site are shared out among programs.

    table: int32 [blocks, 8], see `expand_kernel`; uncut: no panel is cut; align: columns by which all widths and
    offsets are divisible.
    """

    table: torch.Tensor
    uncut: bool
    align: int


class TritonLora:
    """The contract of `base.py` with Triton kernels. chunk_rows: the most rows of a tile in a large step."""

    def __init__(
        self,
        table: LoraTable,
        sites: tuple[LoraSite, ...],
        *,
        name: str = "csgmv",
        chunk_rows: int = MAX_TILE_ROWS,
        tuning: Tuning | None = None,
        graph_rows: int = GRAPH_ROWS,
        decode_rows: int = DECODE_ROWS,
    ):
        self.name = name
        self.tuning = tuning or (CSGMV if name == "csgmv" else TRITON)
        self._vector = name == "csgmv"
        self._table = DeviceTable(table, sites)
        self._applied = [site for site in sites if site.name != EMBED and not site.experts]  # its input is token ids
        self._device = table.weights.device
        self._chunk_rows = min(chunk_rows, MAX_TILE_ROWS)
        self._graph_rows, self._decode_rows = graph_rows, decode_rows
        self.overlap = can_launch_early(self._device)
        """Whether kernels of small steps start while the one before still runs (programmatic dependent launch)."""
        self._align = math.gcd(table.page_elements, 8)
        self._columns: dict[tuple[int, int], Columns] = {}
        shapes: dict[tuple[object, ...], int] = {}
        self._shape = [shapes.setdefault((s.in_features, s.slices), len(shapes)) for s in sites]
        words = FURTHER * ENTRY_WORDS + max(graph_rows, decode_rows) * TILE_WORDS
        self._fixed = torch.zeros(words, dtype=torch.int32, device=self._device)
        self._fixed_large = self._fixed[:0]  # the same of large steps, see `_captured_step`
        self._fixed_h = torch.zeros(H_BYTES // 4, dtype=torch.float32, device=self._device)
        self._step: Step | None = None
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._begun = False
        self._experts: ExpertLora | None = None
        if any(site.experts for site in sites):
            self._experts = ExpertLora(self._table, self._fixed_h, graph_rows, align=self._align, vector=self._vector)
        self.replayable = False
        """See `LoraBackend`."""

    def prepare(self, segments: Segments, num_rows: int, *, captured: bool = False, decodes: bool = False) -> None:
        """See `LoraBackend`."""
        small = num_rows <= (self._decode_rows if captured and decodes else self._graph_rows)
        captured = captured and not decodes and self._experts is None
        if small:
            self._step = self._small_step(segments, num_rows)
        else:
            found = self._captured_step(segments, num_rows) if captured else None
            self.replayable = found is not None
            self._step = found or self._large_step(segments, num_rows)
        if self._experts is not None:
            phase = self.tuning.small if small else self.tuning.large  # `medium` was not measured on experts
            fixed = self._experts.prepare(segments, num_rows, phase)
            self.replayable = self.replayable and fixed

    def expert_segments(self) -> torch.Tensor | None:
        """See `LoraBackend`."""
        return self._experts.segments if self._experts is not None else None

    def apply_experts(self, y: torch.Tensor, x: torch.Tensor, site: int, rows: ExpertRows) -> None:
        """See `LoraBackend`."""
        assert self._experts is not None
        self._experts.apply(y, x, self._table.sites[site], rows)

    def _small_step(self, segments: Segments, num_rows: int) -> Step:
        """The step of a fixed grid: the launches are the same for every step of as many rows."""
        blocks = self.tuning.of(num_rows)
        if self._vector:
            segments = in_single_rows(segments, blocks.few_rows)
        found = make_tiles(segments, MIN_TILE, self._table.stacked_rank, blocks.parts)
        need = self._h_need(found, blocks)
        self.replayable = need <= len(self._fixed_h) and len(found.entries) <= FURTHER
        further = FURTHER if self.replayable else cdiv(len(found.entries), 2) * 2  # tiles stay 16-byte aligned
        words = np.zeros((further * ENTRY_WORDS + num_rows * TILE_WORDS,), np.int32)
        words[: found.entries.size] = found.entries.ravel()
        at = further * ENTRY_WORDS
        words[at : at + found.tiles.size] = found.tiles.ravel()
        on_device = self._on_device(words, self._fixed if self.replayable else None)
        use = self._use(segments)
        beside = self._side is not None and use is None and num_rows >= BESIDE_ROWS
        h = self._room(need)
        group = LaunchGroup(on_device[at:], num_rows, h, use, blocks, self._vector, MIN_TILE, any_rank=True)
        return Step((group,), on_device[:at], 0, self.overlap and not beside, beside)

    def _captured_step(self, segments: Segments, num_rows: int) -> Step | None:
        """The large step of a fixed grid. None: it has too many segments, single rows or adapters for that."""
        small, large, rows, half = self.tuning.small, self.tuning.large, self._chunk_rows, len(self._fixed_h) // 2
        apart, gated = self._vector and self.tuning.singles_apart, large.gated is not None
        many, single = split_singles(segments) if apart else (segments, ())
        tiles, singles = (make_tiles(part, rows, self._table.stacked_rank) for part in (many, single))
        base = base_tiles(many, num_rows, rows) if gated else tiles.tiles[:0]
        tables = CapturedTables.of(num_rows, rows)
        words = tables.words(tiles, base, singles)
        most = max(self._h_need(tiles, large), self._h_need(singles, small))
        if words is None or most > half:
            return None
        if not len(self._fixed_large):
            self._fixed_large = torch.zeros(len(words), dtype=torch.int32, device=self._device)
        assert len(words) <= len(self._fixed_large), "the largest comes first"
        on_device = self._on_device(words, self._fixed_large)
        at, h, own_h = on_device[tables.tiles_at :], self._fixed_h[:half], self._fixed_h[half:]
        groups = [LaunchGroup(at, tables.room, h, None, large, False, rows, any_rank=True)]
        if apart:
            singles_at = on_device[tables.singles_at :]
            groups.append(
                LaunchGroup(singles_at, CAPTURED_SINGLES, own_h, None, small, True, MIN_TILE, any_rank=True)
            )
        entries = on_device[: tables.tiles_at]
        return Step(tuple(groups), entries, tables.gated * gated, overlap=False, beside=False)

    def _large_step(self, segments: Segments, num_rows: int) -> Step:
        """The step of exact grids: what is launched follows from the segments."""
        small, large, rows = self.tuning.small, self.tuning.large, self._chunk_rows
        apart = self._vector and self.tuning.singles_apart
        many, single = split_singles(segments) if apart else (segments, ())
        tiles, singles = (make_tiles(part, rows, self._table.stacked_rank) for part in (many, single))
        gated = large.gated is not None and len(many) > 0
        base = base_tiles(many, num_rows, rows) if gated else tiles.tiles[:0]
        padding = np.zeros(len(tiles.entries) % 2 * ENTRY_WORDS, np.int32)  # tiles stay 16-byte aligned
        parts = tiles.entries, padding, tiles.tiles, base, singles.tiles
        on_device = self._on_device(np.concatenate([part.ravel() for part in parts]), None)
        at, singles_at = tiles.entries.size + padding.size, len(on_device) - singles.tiles.size
        need = self._h_need(tiles, large)
        h = self._room(need + self._h_need(singles, small))
        groups = []
        if many:
            use, grid = self._use(many), len(tiles.tiles)
            groups.append(LaunchGroup(on_device[at:], grid, h[:need], use, large, False, rows, any_rank=False))
        if single:
            use, grid = self._use(single), len(singles.tiles)
            groups.append(
                LaunchGroup(on_device[singles_at:], grid, h[need:], use, small, True, MIN_TILE, any_rank=True)
            )
        gated_tiles = len(tiles.tiles) + len(base) if gated else 0
        return Step(tuple(groups), on_device[:at], gated_tiles, overlap=False, beside=False)

    def _use(self, segments: Segments) -> list[list[int]] | None:
        slots = {slot for s in segments for slot in s.slots}
        return self._table.used_sites(slots).tolist() if slots else None

    def _h_need(self, tiles: StepTiles, blocks: Phase) -> int:
        size = cdiv(max(tiles.h_size, 1), H_ALIGN) * H_ALIGN
        return size * max(splits_of(blocks, site) for site in self._applied)

    def _room(self, need: int) -> torch.Tensor:
        """The intermediate, fp32 [≥ need]: the fixed one if it is large enough, else a new one."""
        if need <= len(self._fixed_h):
            return self._fixed_h
        return torch.empty(need, dtype=torch.float32, device=self._device)

    def _on_device(self, words: np.ndarray, to: torch.Tensor | None) -> torch.Tensor:
        if to is None:
            to = torch.empty(len(words), dtype=torch.int32, device=self._device)
        upload_into(to[: len(words)], words)
        return to

    def begin(self) -> None:
        """See `LoraBackend`."""
        assert self._step is not None
        if self._step.beside and self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            self._begun = True

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        """See `LoraBackend`."""
        if self._begun and self._side is not None:
            self._begun = False
            with torch.cuda.stream(self._side):
                self.shrink(x, site)
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        else:
            self.shrink(x, site)
        self.expand(y, site)

    def apply_gated(self, y: torch.Tensor, x: torch.Tensor, site: int, silu_and_mul: Activation) -> torch.Tensor:
        """See `LoraBackend`."""
        assert self._step is not None
        if not self._step.gated or not self._step.groups[0].touches(site):
            self.apply(y, x, site)
            return silu_and_mul(y)
        self.shrink(x, site)
        for group in self._step.groups[1:]:
            self._expand(group, y, site)
        return self._expand_gated(self._step.groups[0], y, site)

    def shrink(self, x: torch.Tensor, site: int) -> None:
        """The first half: reads x, writes the intermediate."""
        assert self._step is not None
        for group in self._step.groups:
            self._shrink(group, x, site)

    def expand(self, y: torch.Tensor, site: int) -> None:
        """The second half: adds what shrink() of the same site prepared."""
        assert self._step is not None
        for group in self._step.groups:
            self._expand(group, y, site)

    def _shrink(self, group: LaunchGroup, x: torch.Tensor, site: int) -> None:
        assert x.is_contiguous()
        rank = group.rank(site, stacked=True)
        if not rank:
            return
        key = "shrink", self._shape[site], rank
        if key not in group.launches:
            group.launches[key] = self._shrink_launch(group, self._table.sites[site], rank)
        group.launches[key]((x,), site)

    def _expand(self, group: LaunchGroup, y: torch.Tensor, site: int) -> None:
        assert y.is_contiguous()
        if not group.touches(site):
            return
        rank = group.rank(site, stacked=False)
        key = "expand", self._shape[site], rank, y.dtype
        if key not in group.launches:
            group.launches[key] = self._expand_launch(group, self._table.sites[site], rank)
        group.launches[key]((y,), site)

    def _expand_gated(self, group: LaunchGroup, y: torch.Tensor, site: int) -> torch.Tensor:
        """expand() of this group's rows within silu(gate) · up of all rows."""
        assert y.is_contiguous()
        out = torch.empty(y.shape[0], y.shape[1] // 2, dtype=y.dtype, device=y.device)
        rank = group.rank(site, stacked=False)
        key = "gated", self._shape[site], rank
        if key not in group.launches:
            group.launches[key] = self._gated_launch(group, self._table.sites[site], rank, fast_silu(y))
        group.launches[key]((y, out), site)
        return out

    def _shrink_launch(self, group: LaunchGroup, site: LoraSite, rank: int) -> Repeated:
        assert self._step is not None
        table, early = self._table, self._step.overlap
        blocks, splits = group.blocks.shrink(site.in_features), group.splits(site)
        tile_r = group.tile_r(blocks.tile_r, rank)
        parts = group.parts(blocks.parts, rank, tile_r, early)
        cut = table.geometry.part_columns(site.in_features)
        rest = (*self._tables(group), len(table.sites), site.in_features, cut, group.h_split(splits))
        constants = {
            "RECORD": table.record_words,
            "UNCUT": cut == site.in_features,
            "ALIGN": self._align,
            "VECTOR": group.vector,
            "BLOCK_K": blocks.k,
            "TILE_M": group.tile_rows,
            "TILE_K": min(blocks.tile_k, blocks.k),
            "TILE_R": tile_r,
            "PARTS": parts if group.vector else 1,
            "PDL": early,
        }
        return Repeated(
            shrink_kernel, (group.grid, splits, parts), rest, constants, early=early, **options_of(blocks)
        )

    def _expand_launch(self, group: LaunchGroup, site: LoraSite, rank: int) -> Repeated:
        assert self._step is not None
        table, early = self._table, self._step.overlap
        blocks, splits = group.blocks.expand(site.out_features), group.splits(site)
        columns = self._columns_of(site, blocks.n)
        sizes = len(table.sites), site.out_features, group.h_split(splits), splits
        rest = (*self._tables(group), columns.table, *sizes)
        constants = {
            "RECORD": table.record_words,
            "UNCUT": columns.uncut,
            "ALIGN": self._align,
            "ALIGN_N": columns.align,
            "VECTOR": group.vector,
            "BLOCK_N": blocks.n,
            "BLOCK_S": power_of_two(splits),
            "TILE_M": group.tile_rows,
            "TILE_N": min(blocks.tile_n, blocks.n),
            "TILE_R": group.tile_r(blocks.tile_r, rank),
            "PDL": early,
        }
        grid = group.grid, columns.table.shape[0]
        return Repeated(expand_kernel, grid, rest, constants, early=early, **options_of(blocks))

    def _gated_launch(self, group: LaunchGroup, site: LoraSite, rank: int, fast: bool) -> Repeated:
        assert self._step is not None and group.blocks.gated is not None
        gate, up = site.slices
        assert gate.offset == 0 and gate.out_features == up.offset == up.out_features
        table, blocks, splits, width = self._table, group.blocks.gated, group.splits(site), gate.out_features
        cut = table.geometry.part_columns(width)
        rest = (*self._tables(group), len(table.sites), width, cut, group.h_split(splits), splits)
        constants = {
            "RECORD": table.record_words,
            "UNCUT": cut == width,
            "ALIGN": self._align,
            "BLOCK_N": blocks.n,
            "TILE_M": group.tile_rows,
            "TILE_N": min(blocks.tile_n, blocks.n),
            "TILE_R": group.tile_r(blocks.tile_r, rank),
            "FAST": fast,
        }
        grid = self._step.gated, cdiv(width, blocks.n)
        return Repeated(gated_kernel, grid, rest, constants, early=False, **options_of(blocks))

    def _tables(self, group: LaunchGroup) -> tuple[torch.Tensor, ...]:
        assert self._step is not None
        table = self._table
        return group.h, table.weights, table.addresses, table.records, group.tiles, self._step.entries

    def _columns_of(self, site: LoraSite, block_n: int) -> Columns:
        key = self._shape[site.index], block_n
        if key not in self._columns:
            geometry, widths = self._table.geometry, [s.out_features for s in site.slices]
            rows = [
                (i, col, s.out_features, s.offset, geometry.part_columns(s.out_features), 0, 0, 0)
                for i, s in enumerate(site.slices)
                for col in range(0, s.out_features, block_n)
            ]
            assert len(rows[0]) == BLOCK_WORDS
            self._columns[key] = Columns(
                torch.tensor(rows, dtype=torch.int32, device=self._device),
                uncut=all(geometry.num_parts(w) == 1 for w in widths),
                align=math.gcd(16, *widths, *(s.offset for s in site.slices)),
            )
        return self._columns[key]
