"""From a plan to the tensors of one step. Host numbers travel to the device in one copy.

Called by `engine/execution/runner.py`. Knows requests only to read their ids and pages.
"""

import bisect
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from multilora.batch import AttentionMeta, ForwardBatch, LoraSegment
from multilora.engine.plan import Chunk, StepPlan
from multilora.transfer import upload


@dataclass(frozen=True)
class StepInputs:
    """A batch, and which of its input ids the previous step is still sampling: (row, request's chunk)."""

    batch: ForwardBatch
    unknown: list[tuple[int, Chunk]]


def build_inputs(plan: StepPlan, page_size: int, device: torch.device) -> StepInputs:
    """The plan's tokens in order, chunk after chunk."""
    ids: list[int] = []
    positions: list[int] = []
    pages: list[int] = []
    rows: list[int] = []
    unknown = []
    for chunk in plan.chunks:
        first, end = chunk.start, chunk.start + chunk.count
        rows += [len(ids) + p - first for p in logit_positions(chunk)]
        if chunk.known:
            ids += _token_ids(chunk)
        else:
            unknown.append((len(ids), chunk))
            ids.append(0)
        positions += range(first, end)
        table = chunk.request.table.pages
        pages += [table[p // page_size] for p in range(first, end)]
    tables = _page_tables(plan, page_size)
    host = np.concatenate([np.array(x, np.int64) for x in (ids, positions, pages, rows)] + [tables.ravel()])
    sizes = [len(ids), len(ids), len(ids), len(rows), tables.size]
    on_device = upload(torch.from_numpy(host), device).split(sizes)
    meta = AttentionMeta(
        q_lens=tuple(c.count for c in plan.chunks),
        kv_lens=tuple(c.start + c.count for c in plan.chunks),
        page_table=on_device[4].view(tables.shape),
        token_page=on_device[2],
        token_slot=on_device[1] % page_size,
    )
    segments = lora_segments(plan)
    batch = ForwardBatch(on_device[0], on_device[1], meta, segments, on_device[3], logit_segments(segments, rows))
    return StepInputs(batch, unknown)


def _page_tables(plan: StepPlan, page_size: int) -> np.ndarray:
    """int64 [chunks, max pages], zeros behind each request's own."""
    used = [c.request.table.pages[: -(-(c.start + c.count) // page_size)] for c in plan.chunks]
    tables = np.zeros((len(used), max(map(len, used))), np.int64)
    for row, pages in zip(tables, used, strict=True):
        row[: len(pages)] = pages
    return tables


def logit_positions(chunk: Chunk) -> list[int]:
    """Positions whose logits are wanted: for prompt logprobs, then the last one if a token is sampled."""
    positions = list(chunk.logprob_positions)
    return [*positions, chunk.start + chunk.count - 1] if chunk.sample else positions


def lora_segments(plan: StepPlan) -> tuple[LoraSegment, ...]:
    """Neighbouring rows of the same composition; chunks come ordered by it."""
    segments: list[LoraSegment] = []
    row = 0
    for chunk in plan.chunks:
        start, row = row + chunk.pre_activation, row + chunk.count
        if not chunk.slots or start == row:
            continue
        last = segments[-1] if segments else None
        if last and last.end == start and (last.slots, last.weights) == (chunk.slots, chunk.weights):
            segments[-1] = replace(last, end=row)
        else:
            segments.append(LoraSegment(start, row, chunk.slots, chunk.weights))
    return tuple(segments)


def logit_segments(segments: tuple[LoraSegment, ...], rows: list[int]) -> tuple[LoraSegment, ...]:
    """The segments counted in logit rows; `rows`: the token row of each, ascending."""
    ends = [(bisect.bisect_left(rows, s.start), bisect.bisect_left(rows, s.end)) for s in segments]
    return tuple(
        replace(s, start=start, end=end) for s, (start, end) in zip(segments, ends, strict=True) if start < end
    )


def fill_unknown(ids: Tensor, unknown: list[tuple[int, int]], tokens: Tensor) -> None:
    """ids[row] = tokens[index] for each (row, index), on the device."""
    rows, index = upload(torch.tensor(unknown, dtype=torch.int64).T.contiguous(), ids.device)
    ids[rows] = tokens[index]


def _token_ids(chunk: Chunk) -> list[int]:
    request, end = chunk.request, chunk.start + chunk.count
    prompt = len(request.prompt_ids)
    answer = request.output_ids[max(0, chunk.start - prompt) : max(0, end - prompt)]
    return request.prompt_ids[chunk.start : end] + answer
