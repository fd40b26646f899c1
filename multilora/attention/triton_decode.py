"""Paged attention of requests with one new token each: one launch for all of them, a second for those that are split.

It knows page lists, not page tables. The longest requests are cut into pieces (flash decoding), so that few long ones
fill the GPU as well as many short ones, wherever that saves more than merging the pieces costs. Grids have a fixed
size, as a CUDA graph needs, with idle programs at their end. Called by `paged.py`, after rotation and page write.

    pieces   int32 [budget, 5]     row, first entry in the page list, tokens, tokens before a window, slot
                                   slot -1: the piece is an entire request and writes the output itself
    spans    int32 [requests, 3]   each request that is split: row, first slot, pieces (0: none)
    program  (piece, KV head): the queries of the head's group, padded to one tile of `tl.dot`, against the piece
             (span, head): the merge of one head's pieces
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from multilora.attention.triton_scores import LOG2E, block_tokens, capped
from multilora.kernels.integers import power_of_two
from multilora.kernels.triton_launch import can_launch_early, launch, shared_memory, wait_for_previous

PIECE_WORDS, SPAN_WORDS = 5, 3
MIN_PIECE = 64
"""Tokens of the shortest piece: fewer are not worth a program."""

MERGE_TOKENS = 128
"""The merge takes as long as a program takes for this many tokens: a split that saves fewer is not made."""

MAX_SPLIT = 16
"""The most requests that are split: more long ones than that fill the GPU unsplit."""

PROGRAMS = 264
"""Programs that fill a GPU: two for each of Hopper's multiprocessors."""

WARPS, STAGES = 4, 2
"""Warps of a program, and iterations in flight: see docs/log.md."""

MERGE_ELEMENTS = 4096
"""Elements of partial results that a program of the merge holds at a time."""


@triton.jit
def scan(q, best, norm, total, k_pages, v_pages, indices, skip, tokens, page_stride, slot_stride, d, scale, softcap,
         PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr):  # fmt: skip
    """Online softmax of the queries q [M, WIDTH] over tokens `skip` to `tokens` of a page list, from a state on.

    k_pages, v_pages: of the KV head. Returns the state: the best score, the sum of weights, that of weighted values.
    """
    t = skip // BLOCK * BLOCK + tl.arange(0, BLOCK)
    page = tl.load(indices + t // PAGE, mask=t < tokens, other=0)
    for _ in range(skip // BLOCK * BLOCK, tokens, BLOCK):
        inside = (t >= skip) & (t < tokens)
        at = (page.to(tl.int64) * page_stride + (t % PAGE) * slot_stride)[:, None] + d[None, :]
        t += BLOCK
        page = tl.load(indices + t // PAGE, mask=t < tokens, other=0)
        held = inside[:, None] & (d < DIM)[None, :]
        k = tl.load(k_pages + at, mask=held, other=0.0).to(q.dtype)
        score = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, CAP) * LOG2E
        score = tl.where(inside[None, :], score, float("-inf"))
        new = tl.maximum(best, tl.max(score, 1))
        p, fade = tl.exp2(score - new[:, None]), tl.exp2(best - new)
        v = tl.load(v_pages + at, mask=held, other=0.0).to(q.dtype)
        total = tl.dot(p.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
        norm = norm * fade + tl.sum(p, 1)
        best = new
    return best, norm, total


@triton.jit
def _attend(q_ptr, k_pages, v_pages, indices, pieces, sinks_ptr, out_ptr, partial_ptr, lse_ptr, page_stride,
            slot_stride, head_stride, group, scale, v_scale, softcap, PAGE: tl.constexpr, DIM: tl.constexpr,
            WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """Online softmax over the tokens of one piece. q, out: [rows, heads, DIM]; partial: fp32 [slots, heads, DIM];
    lse: fp32 [slots, heads], base 2. WIDTH: DIM rounded up to a power of 2. A sink is a score without a value; that
    of a split request is counted by `_merge`."""
    piece, kv_head = pieces + tl.program_id(0) * 5, tl.program_id(1)
    row, start, tokens = tl.load(piece).to(tl.int64), tl.load(piece + 1), tl.load(piece + 2)
    skip, slot = tl.load(piece + 3), tl.load(piece + 4)
    wait_for_previous(PDL)
    if tokens > 0:
        member, d = tl.arange(0, GROUP), tl.arange(0, WIDTH)
        head = kv_head * group + member
        heads = tl.num_programs(1) * group
        mask = (member < group)[:, None] & (d < DIM)[None, :]
        q = tl.load(q_ptr + (row * heads + head)[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        best = tl.full([GROUP], float("-inf"), tl.float32)
        norm = tl.zeros([GROUP], tl.float32)
        if SINKS:
            sink = tl.load(sinks_ptr + head, mask=member < group, other=0.0).to(tl.float32) * LOG2E
            best, norm = tl.where(slot < 0, sink, best), tl.where(slot < 0, 1.0, norm)
        total = tl.zeros([GROUP, WIDTH], tl.float32)
        k_pages += kv_head * head_stride
        v_pages += kv_head * head_stride
        best, norm, total = scan(q, best, norm, total, k_pages, v_pages, indices + start, skip, tokens, page_stride,
                                 slot_stride, d, scale, softcap, PAGE, DIM, BLOCK, CAP)  # fmt: skip
        total = total / norm[:, None] * v_scale
        if slot < 0:
            to = out_ptr + (row * heads + head)[:, None] * DIM + d[None, :]
            tl.store(to, total.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            at = slot.to(tl.int64) * heads + head
            tl.store(partial_ptr + at[:, None] * DIM + d[None, :], total, mask=mask)
            tl.store(lse_ptr + at, best + tl.log2(norm), mask=member < group)


@triton.jit
def _merge(partial_ptr, lse_ptr, spans, sinks_ptr, out_ptr, DIM: tl.constexpr, WIDTH: tl.constexpr,
           SLOTS: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per (span, head) merges a split request's pieces, SLOTS at a time, in their order."""
    span, head = spans + tl.program_id(0) * 3, tl.program_id(1)
    row, slot, count = tl.load(span).to(tl.int64), tl.load(span + 1).to(tl.int64), tl.load(span + 2)
    heads = tl.num_programs(1)
    wait_for_previous(PDL)
    if count > 0:
        s, d = tl.arange(0, SLOTS), tl.arange(0, WIDTH)
        best = tl.full([], float("-inf"), tl.float32)
        norm = tl.zeros([], tl.float32)
        if SINKS:
            best = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
            norm += 1.0
        total = tl.zeros([WIDTH], tl.float32)
        for i in range(0, count, SLOTS):
            at = (slot + i + s) * heads + head
            inside = i + s < count
            lse = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
            held = inside[:, None] & (d < DIM)[None, :]
            part = tl.load(partial_ptr + at[:, None] * DIM + d[None, :], mask=held, other=0.0)
            new = tl.maximum(best, tl.max(lse, 0))
            fade, weight = tl.exp2(best - new), tl.exp2(lse - new)
            total = total * fade + tl.sum(part * weight[:, None], 0)
            norm = norm * fade + tl.sum(weight, 0)
            best = new
        to = out_ptr + (row * heads + head) * DIM + d
        tl.store(to, (total / norm).to(out_ptr.dtype.element_ty), mask=d < DIM)


@dataclass(frozen=True)
class Pieces:
    """pieces: int32 [budget, 5], unused ones empty; spans: int32 [split_budget, 3], the same: see the file's head."""

    pieces: np.ndarray
    spans: np.ndarray


def budget(rows: int, kv_heads: int) -> int:
    """The most pieces that `rows` requests are cut into."""
    return rows + PROGRAMS // kv_heads


def split_budget(rows: int) -> int:
    """The most of `rows` requests that are split."""
    return min(rows, MAX_SPLIT)


def cut(pages: np.ndarray, tokens: np.ndarray, skip: np.ndarray, page_size: int, most: int) -> Pieces:
    """At most `most` pieces, the longest first: unsplit requests, and pieces of equal length of the others.

    pages, tokens, skip: for each request, how many pages of the list it has (they follow each other), how many tokens
    those hold (0: padding), and how many of the tokens lie before its window.
    """
    rows = len(pages)
    assert rows <= most
    longest, low = int(pages.max()), _shortest(pages, page_size, most)
    if (longest - low) * page_size < MERGE_TOKENS:
        low = max(1, longest)
    each = -(-pages // np.maximum(-(-pages // low), 1))  # pages of a piece, nearly the same for all of a request
    counts = -(-pages // np.maximum(each, 1))
    row = np.repeat(np.arange(rows), counts)
    first = np.cumsum(counts) - counts  # slot of a request's first piece
    index = np.arange(len(row)) - first[row]
    done = index * each[row] * page_size
    table = np.zeros((most, PIECE_WORDS), np.int32)
    table[: len(row), 0] = row
    table[: len(row), 1] = (np.cumsum(pages) - pages)[row] + index * each[row]
    table[: len(row), 2] = np.minimum(each[row] * page_size, tokens[row] - done)
    table[: len(row), 3] = np.where(index == 0, skip[row], 0)
    table[: len(row), 4] = np.where(counts[row] > 1, np.arange(len(row)), -1)
    split = np.flatnonzero(counts > 1)
    spans = np.zeros((split_budget(rows), SPAN_WORDS), np.int32)
    spans[: len(split)] = np.stack((split, first[split], counts[split]), axis=1)
    return Pieces(table[np.argsort(-table[:, 2], kind="stable")], spans)


def _shortest(pages: np.ndarray, page_size: int, most: int) -> int:
    """The smallest length of a piece, in pages, that yields neither too many pieces nor too many split requests."""
    unsplit = np.sort(pages)[: -split_budget(len(pages))]
    low, high = max(1, MIN_PIECE // page_size, int(unsplit.max(initial=0))), max(1, int(pages.max()))
    while low < high:
        middle = (low + high) // 2
        if int(-(-pages // middle).sum()) > most:
            low = middle + 1
        else:
            high = middle
    return low


def decode(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    indices: torch.Tensor,
    pieces: torch.Tensor,
    spans: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    v_scale: float = 1.0,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of one new token per row, into `out`.

    q, out: [rows, heads, head_dim], contiguous; kv: k and v pages, [num_pages, page_size, kv_heads, head_dim] of
    equal strides, the last dimension contiguous; indices: int32, the page lists; pieces, spans: see `cut`, on the
    device; partial: fp32 [budget, heads, head_dim], lse: fp32 [budget, heads], scratch. scale: of the scores, that of
    stored keys included; v_scale: of stored values. softcap, sinks: see `AttentionShape`; sinks [heads].
    """
    k_pages, v_pages = kv
    heads, dim = q.shape[1:]
    kv_heads, width = k_pages.shape[2], max(16, power_of_two(dim))
    group, early = heads // kv_heads, can_launch_early(q.device)
    args = (
        q, k_pages, v_pages, indices, pieces, sinks, out, partial, lse, k_pages.stride(0), k_pages.stride(1),
        k_pages.stride(2), group, scale, v_scale, softcap or 0.0,
    )  # fmt: skip
    constants = {"PAGE": k_pages.shape[1], "DIM": dim, "WIDTH": width, "GROUP": max(16, power_of_two(group))}
    kinds = {"CAP": softcap is not None, "SINKS": sinks is not None, "PDL": early}
    constants |= {"BLOCK": block_tokens(q.dtype, width, shared_memory(q.device))} | kinds
    options = {"num_warps": WARPS, "num_stages": STAGES}
    launch(_attend, (pieces.shape[0], kv_heads), args, constants, early=early, **options)
    constants = {
        "DIM": dim,
        "WIDTH": width,
        "SLOTS": MERGE_ELEMENTS // width,
        "SINKS": sinks is not None,
        "PDL": early,
    }
    launch(_merge, (spans.shape[0], heads), (partial, lse, spans, sinks, out), constants, early=early, num_warps=4)
