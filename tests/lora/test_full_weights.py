"""Whole modules and embedding edits against plain indexing, with weights cut over pages."""

import pytest
import torch

from multilora.adapters.adapter import MODEL_LEVEL, Adapter, Full, LowRank, Rows
from multilora.adapters.packing.blocks import Blocks, PackTarget, pack
from multilora.batch import LoraSegment
from multilora.errors import AdapterIncompatible
from multilora.lora.full_weights import FullWeightModules, product
from multilora.lora.sites import LoraSite, LoraSlice
from multilora.lora.table import LoraTable

VOCAB, HIDDEN = 53, 16
SITES = (LoraSite(0, MODEL_LEVEL, "embed_tokens", VOCAB, (LoraSlice("embed_tokens", 0, HIDDEN),)),)
PAGES = [512, 1024, 8192]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def make(page_bytes: int, *adapters: tuple) -> LoraTable:
    """Each adapter's blocks, at scattered pages, in slots 0, 1, …"""
    target = PackTarget(SITES, torch.float32, page_bytes)
    packed = []
    for blocks in adapters:
        own = Blocks.of(Adapter(blocks, "fingerprint"))
        layout = target.layout(own.shape(SITES))
        buffer = torch.zeros(layout.num_pages, page_bytes, dtype=torch.uint8)
        pack([own], target, layout, buffer)
        packed.append((layout, buffer))
    total = sum(len(buffer) for _, buffer in packed)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).tolist()
    arena = torch.zeros(total, page_bytes, dtype=torch.uint8)
    table = LoraTable(arena, torch.float32, ((0,),))
    for slot, (layout, buffer) in enumerate(packed):
        pages = [order.pop() for _ in buffer]
        arena[pages] = buffer
        table.install(slot, layout, pages)
    return table


@pytest.mark.parametrize("page_bytes", PAGES)
def test_a_whole_weight_is_found_and_multiplies(page_bytes: int) -> None:
    weight, norm = random(21, HIDDEN), random(HIDDEN)
    table = make(page_bytes, (Full(0, "q_proj", weight), Full(0, "input_layernorm", norm)))
    full_weights = FullWeightModules(table, (LoraSegment(2, 5, (0,), (1.0,)),), embed_site=0)
    ((rows, found),) = full_weights.find(0, "q_proj")
    assert rows == slice(2, 5)
    x = random(3, HIDDEN)
    torch.testing.assert_close(product(x, found), x @ weight.T)
    ((_, found),) = full_weights.find(0, "input_layernorm")
    assert torch.equal(found.pieces[0].weight[0], norm)
    assert not list(full_weights.find(1, "q_proj")) and not list(full_weights.find(0, "o_proj"))


@pytest.mark.parametrize("page_bytes", PAGES)
def test_embeddings(page_bytes: int) -> None:
    table_of_base, full, rows = random(VOCAB, HIDDEN), random(VOCAB, HIDDEN) + 1, random(3, HIDDEN) + 2
    low = LowRank(MODEL_LEVEL, "embed_tokens", random(5, VOCAB), random(5, HIDDEN), 0.5)
    table = make(
        page_bytes,
        (Full(MODEL_LEVEL, "embed_tokens", full),),
        (Rows("embed_tokens", (4, 9, 50), rows),),
        (low,),
        (Full(MODEL_LEVEL, "embed_tokens", full), low),
    )
    ids = torch.tensor([9, 1, 52, 9, 4, 50, 49, 0, 52, 9, 9, 3])
    spans = [(1, 3), (3, 7), (7, 9), (9, 11)]
    segments = tuple(LoraSegment(a, b, (i,), (1.0,)) for i, (a, b) in enumerate(spans))
    y = table_of_base[ids]
    FullWeightModules(table, segments, embed_site=0).embed(y, ids, MODEL_LEVEL, "embed_tokens")
    expected = table_of_base[ids]
    expected[1:3] = full[ids[1:3]]
    expected[3], expected[4], expected[5] = rows[1], rows[0], rows[2]
    delta = 0.5 * low.a.T @ low.b  # [vocab, hidden]
    expected[7:9] += delta[ids[7:9]]
    expected[9:11] = full[ids[9:11]] + delta[ids[9:11]]
    torch.testing.assert_close(y, expected)


def test_a_row_that_no_page_holds_is_refused() -> None:
    with pytest.raises(AdapterIncompatible, match=r"q_proj: a row of 4000 bytes is larger than a page.*--page-size"):
        make(1024, (Full(0, "q_proj", random(2, 1000)),))
