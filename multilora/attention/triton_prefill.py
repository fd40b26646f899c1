"""Paged attention of requests with several new tokens: flash attention over page lists, in one launch.

The online softmax is FlashAttention's (Dao 2023, arXiv:2307.08691). Windows, softcaps, sinks, heads of any size and
every floating-point dtype are served, which FlashInfer's kernels are not; its speed is in docs/log.md. Called by
`triton_attention.py`, after rotation and page write.

    blocks   int32 [n, 4]   first row of q, rows (see `rows_of`), position of the first row, start in the page lists
    program  (block, head)  its rows against all tokens that they see

Positions count from the first page that is listed.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from multilora.attention.triton_scores import LOG2E, block_tokens, capped
from multilora.kernels.integers import power_of_two
from multilora.kernels.triton_launch import can_launch_early, launch, shared_memory, wait_for_previous

ROWS, WIDE_ROWS = 64, 16
"""Rows of one program, and in fp32, whose products are made of single multiplications."""
STAGES = 2


@triton.jit
def _attend(q_ptr, k_pages, v_pages, indices, blocks, sinks_ptr, out_ptr, page_stride, slot_stride, head_stride,
            group, scale, v_scale, softcap, window, PAGE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
            ROWS: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """q, out: [rows, heads, DIM]. WIDTH: DIM rounded up to a power of 2."""
    block, head = blocks + tl.program_id(0) * 4, tl.program_id(1)
    row, count = tl.load(block).to(tl.int64), tl.load(block + 1)
    position, start = tl.load(block + 2), tl.load(block + 3)
    heads = tl.num_programs(1)
    wait_for_previous(PDL)
    m, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (m < count)[:, None] & (d < DIM)[None, :]
    at_q = ((row + m) * heads + head)[:, None] * DIM + d[None, :]
    q = tl.load(q_ptr + at_q, mask=mask, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    if SINKS:
        best = tl.zeros([ROWS], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        norm += 1.0
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    k_pages += (head // group) * head_stride
    v_pages += (head // group) * head_stride
    own, end = position + m, position + count
    first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0) // BLOCK * BLOCK
    for begin in range(first, end, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        inside = t < end
        page = tl.load(indices + start + t // PAGE, mask=inside, other=0)
        at = (page.to(tl.int64) * page_stride + (t % PAGE) * slot_stride)[:, None] + d[None, :]
        held = inside[:, None] & (d < DIM)[None, :]
        if WINDOW:
            held = held & (t > position - window)[:, None]
        k = tl.load(k_pages + at, mask=held, other=0.0).to(q.dtype)
        score = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, CAP) * LOG2E
        seen = t[None, :] <= own[:, None]
        if WINDOW:
            seen = seen & (t[None, :] > own[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(best, tl.max(score, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row whose window begins behind this block
        p, fade = tl.exp2(score - base[:, None]), tl.exp2(best - base)
        v = tl.load(v_pages + at, mask=held, other=0.0).to(q.dtype)
        total = tl.dot(p.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
        norm = norm * fade + tl.sum(p, 1)
        best = new
    norm = tl.where(norm > 0.0, norm, 1.0)  # rows beyond `count` may see nothing
    total = total / norm[:, None] * v_scale
    tl.store(out_ptr + at_q, total.to(out_ptr.dtype.element_ty), mask=mask)


def rows_of(dtype: torch.dtype) -> int:
    """Rows of one program."""
    return WIDE_ROWS if dtype.itemsize > 2 else ROWS


def warps_of(width: int) -> int:
    """Warps of one program, for heads of `width` numbers."""
    return 4 if width <= 128 else 8


def blocks_of(q_lens: Sequence[int], requests: np.ndarray, page_size: int, rows: int) -> np.ndarray:
    """int32 [n, 4], see the head of this file, of at most `rows` rows each: those that see most come first. requests:
    see `requests_of`."""
    found = []
    row = 0
    for q_len, start, pages, last in zip(q_lens, requests[2], requests[3], requests[4], strict=True):
        tokens = (pages - 1) * page_size + last + 1  # listed ones, the new ones at their end
        done = np.arange(0, q_len, rows)
        block = np.empty((len(done), 4), np.int32)
        block[:, 0], block[:, 1] = row + done, np.minimum(rows, q_len - done)
        block[:, 2], block[:, 3] = tokens - q_len + done, start
        found.append(block)
        row += q_len
    blocks = np.concatenate(found)
    return blocks[np.argsort(-(blocks[:, 2] + blocks[:, 1]), kind="stable")]


def prefill(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    indices: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    v_scale: float = 1.0,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Causal attention of the new tokens of several requests, into `out`.

    q, out: [rows, heads, head_dim], contiguous; kv, indices, scale, v_scale, softcap, sinks: as `decode` has them;
    blocks: see `blocks_of`, on the device; window: how many tokens a token sees, itself included.
    """
    k_pages, v_pages = kv
    heads, dim = q.shape[1:]
    width, early = max(16, power_of_two(dim)), can_launch_early(q.device)
    args = (
        q, k_pages, v_pages, indices, blocks, sinks, out, k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
        heads // k_pages.shape[2], scale, v_scale, softcap or 0.0, window or 0,
    )  # fmt: skip
    constants = {
        "PAGE": k_pages.shape[1],
        "DIM": dim,
        "WIDTH": width,
        "ROWS": rows_of(q.dtype),
        "BLOCK": block_tokens(q.dtype, width, shared_memory(q.device)),
        "CAP": softcap is not None,
        "SINKS": sinks is not None,
        "WINDOW": window is not None,
        "PDL": early,
    }
    options = {"num_warps": warps_of(width), "num_stages": STAGES}
    launch(_attend, (len(blocks), heads), args, constants, early=early, **options)
