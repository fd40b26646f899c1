"""Two small kernels around paged attention: rotation and page write in every layer, the page list of a step.

Called by `paged.py`; the tests also run them in Triton's interpreter, against plain torch.
"""

import torch
import triton
import triton.language as tl

from multilora.attention.kv_dtypes import largest
from multilora.kernels.integers import power_of_two
from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous

PAGE_BLOCK = 256  # pages that one iteration of `_list_pages` copies


@triton.jit
def _rotate_and_write(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, out_row_ptr, k_pages, v_pages,
                      token_page, token_slot, q_token, q_head, k_token, k_head, v_token, v_head,
                      page_stride, slot_stride, head_stride, group, k_scale, v_scale, HALF: tl.constexpr,
                      WIDTH: tl.constexpr, GROUP: tl.constexpr, MOVE_ROWS: tl.constexpr, MOST: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """One program per (token, KV head): its query heads, its k, its v. GROUP, WIDTH: `group` and HALF rounded up to
    powers of 2."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    i = tl.arange(0, WIDTH)
    here = i < HALF
    cos = tl.load(cos_ptr + token * HALF + i, mask=here, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + i, mask=here, other=0.0)

    member = tl.arange(0, GROUP)[:, None]
    mask = (member < group) & here[None, :]
    at = q_ptr + token * q_token + (kv_head * group + member) * q_head + i[None, :]
    first, second = tl.load(at, mask=mask).to(tl.float32), tl.load(at + HALF, mask=mask).to(tl.float32)
    row = tl.load(out_row_ptr + token) if MOVE_ROWS else token
    to = out_ptr + ((row * tl.num_programs(1) + kv_head) * group + member) * (2 * HALF) + i[None, :]
    kind = out_ptr.dtype.element_ty
    tl.store(to, (first * cos[None, :] - second * sin[None, :]).to(kind), mask=mask)
    tl.store(to + HALF, (second * cos[None, :] + first * sin[None, :]).to(kind), mask=mask)

    page = tl.load(token_page + token)
    if page >= 0:
        k_at = k_ptr + token * k_token + kv_head * k_head + i
        v_at = v_ptr + token * v_token + kv_head * v_head + i
        offset = page * page_stride + tl.load(token_slot + token) * slot_stride + kv_head * head_stride + i
        k_first, k_second = tl.load(k_at, mask=here).to(tl.float32), tl.load(k_at + HALF, mask=here).to(tl.float32)
        _store(k_pages + offset, (k_first * cos - k_second * sin).to(kind), here, k_scale, MOST)
        _store(k_pages + offset + HALF, (k_second * cos + k_first * sin).to(kind), here, k_scale, MOST)
        _store(v_pages + offset, tl.load(v_at, mask=here), here, v_scale, MOST)
        _store(v_pages + offset + HALF, tl.load(v_at + HALF, mask=here), here, v_scale, MOST)


@triton.jit
def _store(at, x, mask, scale, MOST: tl.constexpr):
    """As it is, or in a page of 8-bit floats, of which MOST is the largest: see `kv_dtypes.py`."""
    if MOST > 0:
        divided = tl.div_rn(x.to(tl.float32), tl.zeros(x.shape, tl.float32) + scale)
        tl.store(at, tl.clamp(divided, -MOST, MOST).to(at.dtype.element_ty), mask=mask)
    else:
        tl.store(at, x, mask=mask)


@triton.jit(do_not_specialize=["width", "num_requests"])
def _list_pages(page_table, requests, out, token_page, token_slot, width, num_requests, BLOCK: tl.constexpr,
                LAST_TOKEN: tl.constexpr):  # fmt: skip
    """One program per request r: page_table[row, first : first + count] → out[start : start + count].

    requests: int32 [5, num_requests], rows `row, first, start, count, last slot`; row -1 is padding, and lists page
    0. LAST_TOKEN: also write where the request's last token lies.
    """
    r = tl.program_id(0)
    row, first = tl.load(requests + r), tl.load(requests + num_requests + r)
    start, count = tl.load(requests + 2 * num_requests + r), tl.load(requests + 3 * num_requests + r)
    table = page_table + row.to(tl.int64) * width + first
    readable = tl.where(row >= 0, count, 0)
    for done in range(0, count, BLOCK):
        column = done + tl.arange(0, BLOCK)
        pages = tl.load(table + column, mask=column < readable, other=0)
        tl.store(out + start + column, pages.to(tl.int32), mask=column < count)
    if LAST_TOKEN:
        page = tl.full((), -1, tl.int64)
        if readable > 0:
            page = tl.load(table + count - 1).to(tl.int64)
        tl.store(token_page + r, page)
        tl.store(token_slot + r, tl.load(requests + 4 * num_requests + r).to(tl.int64))


def rotate_and_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    token_page: torch.Tensor,
    token_slot: torch.Tensor,
    out_row: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Write rotated k, and v, to their pages; return rotated q, contiguous, its row t at out_row[t] (None: at t), in
    `out` if that is given.

    q: [T, heads, head_dim]; k, v: [T, kv_heads, head_dim]; head_dim is even. rope: see `rotate.CosSin`.
    k_pages, v_pages: [num_pages, page_size, kv_heads, head_dim] of equal strides. token_page, token_slot, out_row:
    int64 [T]; a token of page -1 writes nothing. scales: of stored keys and values, where pages are of 8-bit floats.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    cos, sin = rope
    if out is None:
        out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    early = can_launch_early(q.device)
    args = (
        q, k, v, cos, sin, out, out_row, k_pages, v_pages, token_page, token_slot,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), heads // kv_heads, *scales,
    )  # fmt: skip
    constants = {
        "HALF": head_dim // 2,
        "WIDTH": power_of_two(head_dim // 2),
        "GROUP": power_of_two(heads // kv_heads),
        "MOVE_ROWS": out_row is not None,
        "MOST": largest(k_pages.dtype) or 0.0,
        "PDL": early,
    }
    launch(_rotate_and_write, (tokens, kv_heads), args, constants, early=early, num_warps=1)
    return out


def list_pages(
    page_table: torch.Tensor,
    requests: torch.Tensor,
    out: torch.Tensor,
    last_token: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Gather the pages of these requests into one flat list.

    page_table: [rows, width]; requests: int32 [5, R], see `_list_pages`; out: int32 [at least all counts].
    last_token: two int64 [R] that receive page and slot of every request's last token; padding gets page -1.
    """
    token_page, token_slot = last_token or (None, None)
    count = requests.shape[1]
    args = (page_table, requests, out, token_page, token_slot, page_table.stride(0), count)
    launch(_list_pages, (count,), args, {"BLOCK": PAGE_BLOCK, "LAST_TOKEN": last_token is not None})
