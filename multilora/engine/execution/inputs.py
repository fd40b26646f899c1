"""From a plan to the tensors of one step. Host numbers travel to the device in one copy.

`PageTables` is what a runner remembers of pages between steps. Called by `engine/execution/runner.py`.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multilora.batch import AttentionMeta, ColumnPages, ForwardBatch, LoraSegment
from multilora.engine.execution.shared_pages import find_shared
from multilora.engine.plan import Chunk, PageUpdate, StepPlan
from multilora.transfer import upload

Ints = npt.NDArray[np.int64]

_UNKNOWN = (0,)  # stands for a token that only the device knows


class PageTables:
    """The arena pages of each slot, block after block; int64 [slots, width · columns] on the host, zeros where there
    is none. A block is `page_size` tokens, which have a page in each of `columns`."""

    def __init__(self, page_size: int, columns: int = 1):
        self.page_size = page_size
        self.columns = columns
        self._pages: Ints = np.zeros((8, 8 * columns), np.int64)

    def update(self, updates: Iterable[PageUpdate]) -> None:
        """Where a slot gets pages from its `first` on, whatever stood behind them is void."""
        for update in updates:
            end = update.first + len(update.pages)
            if update.slot >= self._pages.shape[0] or end > self._pages.shape[1]:
                self._grow(update.slot + 1, end)
            row = self._pages[update.slot]
            row[update.first : end] = update.pages
            row[end:] = 0

    def tables(self, slots: Ints, kv_lens: Ints) -> Ints:
        """[columns, R, most blocks in use]: the pages of these slots, which hold so many tokens by now."""
        used = -(-int(kv_lens.max()) // self.page_size)
        return self._by_column()[:, slots, :used]

    def of_tokens(self, slots: Ints, positions: Ints) -> Ints:
        """[columns, T]: the pages of each (slot, position)."""
        return self._by_column()[:, slots, positions // self.page_size]

    def _by_column(self) -> Ints:
        """[columns, slots, width], a view."""
        return self._pages.reshape(len(self._pages), -1, self.columns).transpose(2, 0, 1)

    def _grow(self, slots: int, width: int) -> None:
        old = self._pages
        rows, columns = (
            max(n, 2 * has) if n > has else has for n, has in zip((slots, width), old.shape, strict=True)
        )
        columns = -(-columns // self.columns) * self.columns
        self._pages = np.zeros((rows, columns), np.int64)
        self._pages[: old.shape[0], : old.shape[1]] = old


@dataclass(frozen=True)
class Newest:
    """What the step before has sampled: tokens int64 [n] on the device; index: slot → its last one among them."""

    index: Mapping[int, int]
    tokens: Tensor


def build_inputs(
    plan: StepPlan, tables: PageTables, newest: Newest, device: torch.device, *, cascade: bool = False
) -> ForwardBatch:
    """The plan's tokens in order, chunk after chunk. `tables` knows the plan's pages already. cascade: look for pages
    that decodes share."""
    chunks = plan.chunks
    slots = np.array([c.slot for c in chunks], np.int64)
    counts = np.array([c.count for c in chunks], np.int64)
    kv_lens = np.array([c.start for c in chunks], np.int64) + counts
    ends = counts.cumsum()  # [R] row behind each chunk's last
    total = int(ends[-1])
    positions = np.arange(total) + (kv_lens - ends).repeat(counts)
    ids = np.fromiter(chain.from_iterable([c.token_ids or _UNKNOWN for c in chunks]), np.int64, total)
    page_table = tables.tables(slots, kv_lens)  # [columns, R, blocks]
    logit_rows = _logit_rows(chunks, ends)
    unknown = [
        (end - 1, newest.index[c.slot]) for c, end in zip(chunks, ends.tolist(), strict=True) if not c.token_ids
    ]
    parts = [
        ids,
        positions,
        tables.of_tokens(slots.repeat(counts), positions).ravel(),
        positions % tables.page_size,
        np.array(logit_rows, np.int64),
        np.array(unknown, np.int64).reshape(-1, 2).T.ravel(),
        page_table.ravel(),
    ]
    uploaded = upload(torch.from_numpy(np.concatenate(parts)), device)
    on_device = torch.split(uploaded, [part.size for part in parts])
    if unknown:
        rows, index = on_device[5].view(2, -1)
        on_device[0][rows] = newest.tokens[index]
    found = zip(on_device[6].view(page_table.shape), on_device[2].view(len(page_table), -1), strict=True)
    first, *further = [ColumnPages(table, token_page) for table, token_page in found]
    meta = AttentionMeta(
        q_lens=tuple(counts.tolist()),
        kv_lens=tuple(kv_lens.tolist()),
        page_table=first.page_table,
        token_page=first.token_page,
        token_slot=on_device[3],
        further=tuple(further),
        shared=find_shared(page_table[0], np.flatnonzero(counts == 1), kv_lens, tables.page_size) if cascade else (),
    )
    segments = lora_segments(chunks)
    logit_lora = segments if len(logit_rows) == total else logit_segments(segments, logit_rows)
    return ForwardBatch(on_device[0], on_device[1], meta, segments, on_device[4], logit_lora)


def logit_count(chunk: Chunk) -> int:
    """Rows of logits that the chunk wants: first those of prompt logprobs, then one for each sampled token."""
    prompt = chunk.prompt_logprobs
    return len(chunk.answer_positions) + (len(prompt.next_ids) if prompt is not None else 0)


def _logit_rows(chunks: Sequence[Chunk], ends: Ints) -> list[int]:
    """The token row of each row of logits, ascending."""
    rows: list[int] = []
    for chunk, end in zip(chunks, ends.tolist(), strict=True):
        if chunk.prompt_logprobs is not None:
            first = end - chunk.count + chunk.prompt_logprobs.first - chunk.start
            rows += range(first, first + len(chunk.prompt_logprobs.next_ids))
        rows += range(end - len(chunk.answer_positions), end)
    return rows


def lora_segments(chunks: Sequence[Chunk]) -> tuple[LoraSegment, ...]:
    """Neighbouring rows of the same composition; chunks come ordered by it."""
    segments: list[LoraSegment] = []
    adapters: tuple[tuple[int, ...], tuple[float, ...]] = (), ()  # of the segment [first, end)
    first = end = row = 0
    for chunk in chunks:
        start, row = row + chunk.pre_activation, row + chunk.count
        if not chunk.lora_slots or start == row:
            continue
        if start != end or adapters != (chunk.lora_slots, chunk.lora_weights):
            if first < end:
                segments.append(LoraSegment(first, end, *adapters))
            first, adapters = start, (chunk.lora_slots, chunk.lora_weights)
        end = row
    if first < end:
        segments.append(LoraSegment(first, end, *adapters))
    return tuple(segments)


def logit_segments(segments: tuple[LoraSegment, ...], rows: list[int]) -> tuple[LoraSegment, ...]:
    """The segments counted in logit rows; `rows`: the token row of each, ascending."""
    ends = [(bisect.bisect_left(rows, s.start), bisect.bisect_left(rows, s.end)) for s in segments]
    return tuple(
        replace(s, start=start, end=end) for s, (start, end) in zip(segments, ends, strict=True) if start < end
    )
