"""The host side of the LoRA kernels of experts: the tables of a step, and two launches per site of experts.

In steps of up to GRAPH_ROWS rows the tables and the intermediate are fixed, so a captured graph serves every later
step of as many rows; grids depend on nothing but the number of rows. Called by `triton_backend.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from multilora.batch import ExpertRows
from multilora.kernels.integers import cdiv
from multilora.kernels.triton_launch import Repeated
from multilora.lora.device_table import DeviceTable
from multilora.lora.panels import RANK_GRANULE
from multilora.lora.sites import LoraSite
from multilora.lora.triton_expert_kernels import expert_expand_kernel, expert_shrink_kernel
from multilora.lora.triton_panels import ENTRY_WORDS, TILE_WORDS
from multilora.lora.triton_steps import FURTHER, MIN_TILE, Segments, splits_of
from multilora.lora.tuning import TRITON, Phase, options_of
from multilora.transfer import upload_into


class ExpertLora:
    """What `TritonLora` does at sites of experts. graph_rows: the most rows of a step with fixed tables; h: the fixed
    intermediate, fp32, flat, which it shares with the other sites; align: see `TritonLora`; vector: tiles of one row
    take the vector functions."""

    def __init__(self, table: DeviceTable, h: torch.Tensor, graph_rows: int, *, align: int, vector: bool):
        self._table, self._device = table, table.weights.device
        self._fixed_h, self._graph_rows, self._align, self._vector = h, graph_rows, align, vector
        self._sites = [site for site in table.sites if site.experts]
        words = FURTHER * ENTRY_WORDS + graph_rows * TILE_WORDS
        self._fixed_words = torch.zeros(words, dtype=torch.int32, device=self._device)
        self._fixed_segments = torch.zeros(graph_rows, dtype=torch.int64, device=self._device)
        self._top_k = 1  # the most that was seen; what is replayed has been captured before
        self._step = _Step(self._fixed_words, 0, TRITON.small, 0, vector=False)
        self._launches: dict[tuple[object, ...], tuple[Repeated, Repeated]] = {}
        self.segments: torch.Tensor | None = None
        """See `LoraBackend.expert_segments`."""

    def prepare(self, segments: Segments, num_rows: int, phase: Phase) -> bool:
        """Take the step's segments, and the block sizes for them. Returns whether the tables are the fixed ones, so
        that a graph over as many rows may be replayed."""
        ranks = [sum(self._table.expert_rank(slot) for slot in s.slots) for s in segments]
        rank, further = max(ranks, default=0), sum(len(s.slots) - 1 for s in segments)
        fixed = num_rows <= self._graph_rows and further <= FURTHER and rank <= self._room(num_rows, phase)
        self._launches, self.segments = {}, None
        if not fixed and not rank:
            return False
        if fixed:
            entries, words, numbers = FURTHER, self._fixed_words, self._fixed_segments[:num_rows]
        else:
            entries = cdiv(further, 4) * 4  # groups stay 32-byte aligned
            size = entries * ENTRY_WORDS + len(segments) * TILE_WORDS
            words = torch.empty(size, dtype=torch.int32, device=self._device)
            numbers = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        self._upload(segments, words[: entries * ENTRY_WORDS], words[entries * ENTRY_WORDS :], numbers)
        vector = self._vector and num_rows <= self._graph_rows
        self._step = _Step(words, entries * ENTRY_WORDS, phase, rank, vector)
        if rank or not segments:
            self.segments = numbers
        return fixed

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: LoraSite, rows: ExpertRows) -> None:
        """See `LoraBackend.apply_experts`."""
        assert rows.segments is not None and x.is_contiguous() and y.is_contiguous()
        tokens, top_k = rows.places.shape
        self._top_k = max(self._top_k, top_k)
        key = site.in_features, site.out_features, len(x), y.dtype
        if key not in self._launches:
            self._launches[key] = self._make(site, len(x), self._room(tokens, self._step.phase))
        shrink, expand = self._launches[key]
        shrink((x, rows.experts, rows.segments), site.index)
        expand((y, rows.experts, rows.segments), site.index)

    def _room(self, tokens: int, phase: Phase) -> int:
        """The largest rank for which the fixed intermediate holds the rows of so many tokens."""
        splits = max(splits_of(phase, site) for site in self._sites)
        return len(self._fixed_h) // (splits * tokens * self._top_k) // RANK_GRANULE * RANK_GRANULE

    def _upload(self, segments: Segments, entries: torch.Tensor, groups: torch.Tensor, numbers: torch.Tensor) -> None:
        """Fill the tables: further adapters, one group per segment, the segment of each row."""
        of_row = np.zeros(len(numbers), np.int64)
        found: list[tuple[int, int]] = []
        rows = np.zeros((len(segments), TILE_WORDS), np.int32)
        for number, segment in enumerate(segments):
            of_row[segment.start : segment.end] = number + 1
            weights = np.array(segment.weights, np.float32).view(np.int32).tolist()
            rows[number, 1], rows[number, 4] = len(segment.slots) << 16, len(found)
            rows[number, 5], rows[number, 6] = segment.slots[0], weights[0]
            found += zip(segment.slots[1:], weights[1:], strict=True)
        upload_into(numbers, of_row)
        upload_into(groups[: rows.size], rows.ravel())
        if found:
            words = np.array(found, np.int32).ravel()
            upload_into(entries[: len(words)], words)

    def _make(self, site: LoraSite, rows: int, room: int) -> tuple[Repeated, Repeated]:
        """The two launches of every site of this shape, over so many rows."""
        step, splits = self._step, splits_of(self._step.phase, site)
        stride, h = room, self._fixed_h
        if room < step.rank:  # as for a large step, and for the first of all
            stride = step.rank
            h = torch.empty(splits * rows * stride, dtype=torch.float32, device=self._device)
        table = self._table
        tables = h, table.weights, table.addresses, table.records, step.words[step.groups :], step.words
        sizes = stride, rows * stride
        return self._shrink(site, rows, splits, (*tables, rows), sizes), self._expand(
            site, rows, splits, (*tables, rows), sizes
        )

    def _shrink(
        self, site: LoraSite, rows: int, splits: int, first: tuple[object, ...], h: tuple[int, int]
    ) -> Repeated:
        blocks, table = self._step.phase.shrink(site.in_features), self._table
        cut = table.geometry.part_columns(site.in_features)
        rest = (*first, len(table.sites), site.in_features, cut, *h)
        constants = {
            "RECORD": table.record_words,
            "UNCUT": cut == site.in_features,
            "ALIGN": self._align,
            "VECTOR": self._step.vector,
            "BLOCK_K": blocks.k,
            "TILE_M": MIN_TILE,
            "TILE_K": min(blocks.tile_k, blocks.k),
            "TILE_R": blocks.tile_r,
        }
        return Repeated(expert_shrink_kernel, (rows, splits), rest, constants, early=False, **options_of(blocks))

    def _expand(
        self, site: LoraSite, rows: int, splits: int, first: tuple[object, ...], h: tuple[int, int]
    ) -> Repeated:
        blocks, table = self._step.phase.expand(site.out_features), self._table
        cut = table.geometry.part_columns(site.out_features)
        rest = (*first, len(table.sites), site.out_features, cut, *h, splits)
        constants = {
            "RECORD": table.record_words,
            "UNCUT": cut == site.out_features,
            "ALIGN": self._align,
            "BLOCK_N": blocks.n,
            "TILE_M": MIN_TILE,
            "TILE_N": min(blocks.tile_n, blocks.n),
            "TILE_R": blocks.tile_r,
        }
        grid = rows, cdiv(site.out_features, blocks.n)
        return Repeated(expert_expand_kernel, grid, rest, constants, early=False, **options_of(blocks))


@dataclass(frozen=True)
class _Step:
    """What the launches of one step need. words: entries, from `groups` on groups; rank: the largest of a segment."""

    words: torch.Tensor
    groups: int
    phase: Phase
    rank: int
    vector: bool
