"""Rotation with page write, and page lists, against plain torch: in Triton's interpreter, and on a GPU.

Covers `rotate.py` too.
"""

import pytest
import torch

pytest.importorskip("triton")

from multilora.attention import triton_kernels as kernels
from multilora.attention.kv_dtypes import as_stored
from multilora.attention.rotate import rotate
from multilora.memory.kv_layout import KVLayout

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":  # the interpreter rounds bfloat16 towards zero
    DTYPES.append(torch.bfloat16)


@pytest.mark.parametrize("move_rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 8), (6, 2, 16), (8, 2, 64), (3, 3, 128)])
def test_rotate_and_write(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, move_rows: bool) -> None:
    tokens, layer = 5, 1
    layout = KVLayout(2, 4, kv_heads, head_dim, dtype)
    arena = torch.zeros(7, layout.page_bytes, dtype=torch.uint8, device=DEVICE)
    k_pages, v_pages = layout.views(arena)[layer]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype).to(DEVICE)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    angle = torch.randn(tokens, 1, head_dim // 2, generator=generator).to(DEVICE)
    rope = (angle.cos(), angle.sin())
    page = torch.tensor([6, 0, -1, 6, 3], device=DEVICE)  # the third token is padding
    slot = torch.tensor([3, 0, 0, 1, 2], device=DEVICE)
    out_row = torch.tensor([2, 0, 4, 1, 3], device=DEVICE) if move_rows else None

    got = kernels.rotate_and_write(q, k, v, rope, k_pages, v_pages, page, slot, out_row)

    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 8e-3}
    want = rotate(q, *rope)
    torch.testing.assert_close(got if out_row is None else got[out_row], want, **tolerance)
    real = page >= 0
    where = (page[real], slot[real])
    torch.testing.assert_close(k_pages[where], rotate(k, *rope)[real], **tolerance)
    assert torch.equal(v_pages[where], v[real])
    for view in layout.views(arena)[layer]:
        view[where] = 0
    assert not arena.any(), "something else was written"


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_pages_of_8_bit_floats(stored: torch.dtype) -> None:
    """Numbers that need no rounding, which the interpreter does in a way of its own; what is too large becomes the
    largest."""
    layout = KVLayout(1, 4, 2, 16, stored)
    ((k_pages, v_pages),) = layout.views(torch.zeros(3, layout.page_bytes, dtype=torch.uint8, device=DEVICE))
    values = torch.tensor([-448.0, -1.5, -0.25, 0.0, 0.125, 1.0, 3.5, 112.0], device=DEVICE)
    k, v = values.repeat(5, 2, 2), values.flip(0).repeat(5, 2, 2)
    v[0, 0, 0] = 1e7
    page, slot = torch.tensor([2, 0, -1, 2, 0], device=DEVICE), torch.tensor([3, 0, 0, 1, 2], device=DEVICE)
    rope = torch.ones(5, 1, 8, device=DEVICE), torch.zeros(5, 1, 8, device=DEVICE)
    kernels.rotate_and_write(k, k, v, rope, k_pages, v_pages, page, slot, scales=(2.0, 0.5))
    real = page >= 0
    for pages, given, scale in ((k_pages, k, 2.0), (v_pages, v, 0.5)):
        found = pages.float()[page[real], slot[real]]
        assert torch.equal(found, as_stored(given, stored, scale).float()[real])


def test_list_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PAGE_BLOCK", 4)
    table = torch.arange(60, device=DEVICE).view(3, 20) + 100
    # row, first, start, count, last slot; the fourth request is padding
    columns = [(2, 0, 0, 1, 5), (0, 3, 1, 9, 0), (1, 12, 10, 8, 7), (-1, 0, 18, 1, 0)]
    requests = torch.tensor(columns, dtype=torch.int32, device=DEVICE).T.contiguous()
    out = torch.full((22,), -7, dtype=torch.int32, device=DEVICE)
    page, slot = (torch.full((4,), -9, device=DEVICE) for _ in range(2))

    kernels.list_pages(table, requests, out, (page, slot))

    want = [*table[2, :1], *table[0, 3:12], *table[1, 12:20], 0, -7, -7, -7]
    assert out.tolist() == [int(w) for w in want]
    assert page.tolist() == [140, 111, 139, -1]
    assert slot.tolist() == [5, 0, 7, 0]
    again = torch.zeros(22, dtype=torch.int32, device=DEVICE)
    kernels.list_pages(table, requests, again)
    assert again[:19].tolist() == out[:19].tolist()
