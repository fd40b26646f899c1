"""Paged attention of requests that begin with the same pages, each with one new token: these pages are read once for
many of them (cascade attention, as in Hydragen, Juravsky et al. 2024, arXiv:2402.05099, and in FlashInfer).

A piece is a stretch of shared pages and up to `most_members` requests that share it. Its program computes the queries
of all of them as one tile, and leaves a partial result for each, in that request's slots, where `triton_decode.py`'s
merge finds it beside those of the pages that are the request's own. Called by `cascade.py`.

    pieces   int32 [pieces, 4 + 2 · members]   first entry in the page list, tokens, members, unused;
                                               a row for each member, then a slot for each
    program  (piece, KV head): members · heads of the group as rows of `tl.dot`, against the stretch
"""

import torch
import triton
import triton.language as tl

from multilora.attention.triton_decode import STAGES, WARPS, scan
from multilora.attention.triton_scores import block_tokens
from multilora.kernels.integers import power_of_two
from multilora.kernels.triton_launch import can_launch_early, launch, shared_memory, wait_for_previous

HEAD_WORDS = 4
TILE = 64
"""Rows of a tile: what one instruction of Hopper's matrix units takes."""
NARROW = 128
"""Columns of a head, up to which so many sums have room in the registers of `WARPS` warps."""


@triton.jit
def _attend_shared(q_ptr, k_pages, v_pages, indices, pieces, partial_ptr, lse_ptr, page_stride, slot_stride,
                   head_stride, group, scale, v_scale, softcap, PAGE: tl.constexpr, DIM: tl.constexpr,
                   WIDTH: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
                   CAP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """q: [rows, heads, DIM]; partial: fp32 [slots, heads, DIM]; lse: fp32 [slots, heads], base 2. GROUP: the heads of
    a group, rounded up to a power of 2; a tile has MEMBERS · GROUP rows. Sinks are counted by the merge."""
    piece, kv_head = pieces + tl.program_id(0) * (4 + 2 * MEMBERS), tl.program_id(1)
    start, tokens, members = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    m, d = tl.arange(0, MEMBERS * GROUP), tl.arange(0, WIDTH)
    member, place = m // GROUP, m % GROUP
    valid = (member < members) & (place < group)
    row = tl.load(piece + 4 + member, mask=valid, other=0).to(tl.int64)
    slot = tl.load(piece + 4 + MEMBERS + member, mask=valid, other=0).to(tl.int64)
    wait_for_previous(PDL)
    head, heads = kv_head * group + place, tl.num_programs(1) * group
    mask = valid[:, None] & (d < DIM)[None, :]
    q = tl.load(q_ptr + (row * heads + head)[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    best = tl.full([MEMBERS * GROUP], float("-inf"), tl.float32)
    norm = tl.zeros([MEMBERS * GROUP], tl.float32)
    total = tl.zeros([MEMBERS * GROUP, WIDTH], tl.float32)
    k_pages += kv_head * head_stride
    v_pages += kv_head * head_stride
    best, norm, total = scan(q, best, norm, total, k_pages, v_pages, indices + start, 0, tokens, page_stride,
                             slot_stride, d, scale, softcap, PAGE, DIM, BLOCK, CAP)  # fmt: skip
    at = slot * heads + head
    tl.store(partial_ptr + at[:, None] * DIM + d[None, :], total / norm[:, None] * v_scale, mask=mask)
    tl.store(lse_ptr + at, best + tl.log2(norm), mask=valid)


def warps_of(width: int) -> int:
    """How many warps have the registers for the sums of a tile."""
    return WARPS if width <= NARROW else 2 * WARPS


def most_members(group: int) -> int:
    """How many requests a piece serves, where a KV head has so many heads."""
    return max(1, TILE // power_of_two(group))


def attend_shared(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    indices: torch.Tensor,
    pieces: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    v_scale: float = 1.0,
    *,
    softcap: float | None = None,
) -> None:
    """Write the partial results of shared pages. pieces: see the head of this file, on the device; the others are
    `triton_decode.decode`'s."""
    k_pages, v_pages = kv
    heads, dim = q.shape[1:]
    kv_heads, width = k_pages.shape[2], max(16, power_of_two(dim))
    group, early = heads // kv_heads, can_launch_early(q.device)
    args = (
        q, k_pages, v_pages, indices, pieces, partial, lse, k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
        group, scale, v_scale, softcap or 0.0,
    )  # fmt: skip
    members = most_members(group)
    constants = {
        "PAGE": k_pages.shape[1],
        "DIM": dim,
        "WIDTH": width,
        "GROUP": power_of_two(group),
        "MEMBERS": members,
        "BLOCK": block_tokens(q.dtype, width, shared_memory(q.device)),
        "CAP": softcap is not None,
        "PDL": early,
    }
    grid = pieces.shape[0], kv_heads
    launch(_attend_shared, grid, args, constants, early=early, num_warps=warps_of(width), num_stages=STAGES)
