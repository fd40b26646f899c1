"""The C++ attention beside torch's: rotation, odd strides, pages that have moved (and see `test_torch_sdpa.py`)."""

import pytest
import torch
from cpp import NEEDS_CPP

from multilora.attention.base import AttentionShape
from multilora.attention.cpp_attention import CppAttention
from multilora.attention.torch_sdpa import TorchAttention
from multilora.batch import AttentionMeta
from multilora.memory.kv_layout import KVLayout

pytestmark = NEEDS_CPP

HEADS, KV_HEADS, PAGE = 6, 2, 4
KV_LENS = (1, 9, 30, 5)
Q_LENS = (1, 1, 1, 3)


def meta() -> AttentionMeta:
    """Three decodes and a chunk of a prompt, over pages 1 to 15."""
    table = torch.zeros(len(KV_LENS), 8, dtype=torch.int64)
    page, token_page, token_slot = 1, [], []
    for r, (new, total) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        for block in range(-(-total // PAGE)):
            table[r, block] = page
            page += 1
        for token in range(total - new, total):
            token_page.append(int(table[r, token // PAGE]))
            token_slot.append(token % PAGE)
    return AttentionMeta(Q_LENS, KV_LENS, table, torch.tensor(token_page), torch.tensor(token_slot))


def arena(layout: KVLayout) -> torch.Tensor:
    found = torch.zeros(16, layout.page_bytes, dtype=torch.uint8)
    for pair in layout.views(found):
        for view in pair:
            view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(3)))
    return found


def step(attention: TorchAttention, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """q, k and v are parts of one tensor, as a joined projection gives them."""
    tokens = sum(Q_LENS)
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, head_dim, generator=generator).to(dtype)
    angles = torch.randn(tokens, 1, head_dim // 2, generator=generator)
    attention.prepare(meta())
    return attention.forward(0, *qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1), (angles.cos(), angles.sin()))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("head_dim", [2, 10, 64, 80])
def test_rotated_parts_of_one_tensor(head_dim: int, dtype: torch.dtype, atol: float) -> None:
    layout = KVLayout(1, PAGE, KV_HEADS, head_dim, dtype)
    shape = AttentionShape(HEADS, KV_HEADS, head_dim, 0.2, None)
    found = []
    for backend in (TorchAttention, CppAttention):
        pages = arena(layout)
        y = step(backend(layout.views(pages), shape), head_dim, dtype)
        found.append((y.float(), *(view.float() for view in layout.views(pages)[0])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_pages_may_move_between_steps() -> None:
    """As those of an engine do that has slept: the views stay, their memory is another, and so is what lies there."""
    layout = KVLayout(1, PAGE, KV_HEADS, 16, torch.float32)
    shape = AttentionShape(HEADS, KV_HEADS, 16, 0.2, None)
    pages = arena(layout)
    attention = CppAttention(layout.views(pages), shape)
    before = step(attention, 16, torch.float32)
    at, storage, others = pages.data_ptr(), pages.untyped_storage(), []
    size = storage.nbytes()
    while pages.data_ptr() in (0, at):
        storage.resize_(0)
        others.append(torch.zeros(size, dtype=torch.uint8))  # keeps the pages from where they were
        storage.resize_(size)
    pages.copy_(arena(layout).roll(1, 0))
    afresh = CppAttention(layout.views(pages.clone()), shape)
    after = step(attention, 16, torch.float32)
    assert not torch.equal(after, before)
    assert torch.equal(after, step(afresh, 16, torch.float32))


def test_queries_of_another_dtype_than_the_cache() -> None:
    """Layers of transformers may have them: they are rounded to the cache's."""
    layout = KVLayout(1, PAGE, KV_HEADS, 16, torch.bfloat16)
    shape = AttentionShape(HEADS, KV_HEADS, 16, 0.2, None)
    wide, narrow = (
        step(CppAttention(layout.views(arena(layout)), shape), 16, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.dtype == torch.float32
    assert torch.equal(wide, narrow.float())


def test_any_number_of_threads_gives_the_same_bits() -> None:
    layout = KVLayout(1, PAGE, KV_HEADS, 64, torch.bfloat16)
    shape = AttentionShape(HEADS, KV_HEADS, 64, 0.2, None)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(step(CppAttention(layout.views(arena(layout)), shape), 64, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
