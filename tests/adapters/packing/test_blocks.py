"""Packing: what is read back from the pages by the layout alone is what went in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.adapters.adapter import Adapter, LowRank
from multilora.adapters.packing.blocks import Blocks, PackTarget, pack
from multilora.errors import AdapterInvalid
from multilora.lora.panels import PanelLayout
from multilora.lora.sites import LoraSite, LoraSlice

QKV = LoraSite(
    0, 0, "qkv_proj", 48, (LoraSlice("q_proj", 0, 64), LoraSlice("k_proj", 64, 32), LoraSlice("v_proj", 96, 32))
)
O_PROJ = LoraSite(1, 0, "o_proj", 64, (LoraSlice("o_proj", 0, 48),))
DOWN = LoraSite(2, 1, "down_proj", 100, (LoraSlice("down_proj", 0, 48),))
SITES = (QKV, O_PROJ, DOWN)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def target(dtype: torch.dtype = torch.float32, page_bytes: int = 4096) -> PackTarget:
    return PackTarget(SITES, dtype, page_bytes)


def blocks(ranks: dict[str, int], seed: int = 0) -> Blocks:
    """module → rank; weights random."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for site in SITES:
        for part in site.slices:
            if rank := ranks.get(part.module, 0):
                a = torch.randn(rank, site.in_features, generator=random)
                b = torch.randn(rank, part.out_features, generator=random)
                found.append(LowRank(site.layer, part.module, a, b))
    return Blocks.of(Adapter(tuple(found), "fingerprint"))


def packed(items: Blocks, where: PackTarget) -> tuple[PanelLayout, torch.Tensor]:
    layout = where.layout(items.shape(where.sites))
    out = torch.zeros(layout.num_pages, where.page_bytes, dtype=torch.uint8)
    pack([items], where, layout, out)
    return layout, out


def unpacked(layout: PanelLayout, pages: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Every matrix of the layout, [rounded rank, width], part by part."""
    found = []
    for matrix, parts in zip(layout.matrices, layout.parts, strict=True):
        entire = torch.full((matrix.rank, matrix.width), torch.nan, dtype=dtype)
        for part in parts:
            size = 8 * part.columns * dtype.itemsize
            raw = pages[part.page, part.offset : part.offset + size].contiguous()
            entire[part.row : part.row + 8, part.col : part.col + part.columns] = raw.view(dtype).view(8, -1)
        found.append(entire)
    return found


def padded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rank, width = weight.shape
    return torch.cat([weight.to(dtype), torch.zeros(-rank % 8, width, dtype=dtype)])


ranks = st.dictionaries(
    st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]), st.integers(1, 40), min_size=1
)


@settings(deadline=None, max_examples=60)
@given(ranks=ranks, dtype=st.sampled_from(DTYPES), page_bytes=st.sampled_from([512, 1024, 1536, 4096, 65536]))
def test_what_goes_in_comes_out(ranks, dtype, page_bytes):
    items = blocks(ranks)
    layout, pages = packed(items, target(dtype, page_bytes))
    for matrix, entire in zip(layout.matrices, unpacked(layout, pages, dtype), strict=True):
        site = SITES[matrix.site]
        if matrix.slice < 0:
            own = [
                items.low_rank[site.layer, s.module].a
                for s in site.slices
                if (site.layer, s.module) in items.low_rank
            ]
            expected = torch.cat([padded(weight, dtype) for weight in own])
        else:
            expected = padded(items.low_rank[site.layer, site.slices[matrix.slice].module].b, dtype)
        assert torch.equal(entire, expected)


@settings(deadline=None, max_examples=60)
@given(ranks=ranks, page_bytes=st.sampled_from([512, 1024, 1536, 4096]))
def test_parts_lie_inside_pages_and_do_not_overlap(ranks, page_bytes):
    where = target(torch.float32, page_bytes)
    layout = where.layout(blocks(ranks).shape(SITES))
    taken = torch.zeros(layout.num_pages, page_bytes, dtype=torch.int32)
    for part in (c for parts in layout.parts for c in parts):
        size = 8 * part.columns * 4
        assert part.offset + size <= page_bytes
        taken[part.page, part.offset : part.offset + size] += 1
    assert taken.max() == 1
    assert bool(taken.any(dim=1).all()), "an empty page"


def test_only_what_is_targeted_takes_room():
    layout = target().layout(blocks({"v_proj": 3}).shape(SITES))
    assert [(m.site, m.slice, m.rank) for m in layout.matrices] == [(0, -1, 8), (0, 2, 8)]
    assert layout.num_pages == 1
    assert layout.used_bytes == 8 * (48 + 32) * 4


def test_the_layout_depends_on_ranks_only():
    one, two = blocks({"q_proj": 5, "o_proj": 9}, seed=1), blocks({"q_proj": 5, "o_proj": 9}, seed=2)
    assert packed(one, target())[0] is packed(two, target())[0]


def test_a_transposed_view_is_packed_as_it_reads():
    items = blocks({"o_proj": 6})
    key = (0, "o_proj")
    straight = items.low_rank[key]
    items.low_rank[key] = LowRank(0, "o_proj", straight.a, straight.b.t().contiguous().t())
    assert torch.equal(packed(items, target())[1], packed(blocks({"o_proj": 6}), target())[1])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e5, 66000.0])
@pytest.mark.parametrize("half", ["a", "b"])
def test_what_is_not_finite_in_the_target_dtype_is_refused(half, value):
    items = blocks({"o_proj": 12, "q_proj": 4})
    getattr(items.low_rank[0, "o_proj"], half)[11, 3] = value
    with pytest.raises(AdapterInvalid, match=rf"layer 0 o_proj lora_{half.upper()}.*not finite in torch.float16"):
        packed(items, target(torch.float16))
    if abs(value) < torch.inf:
        packed(items, target(torch.bfloat16))


def test_the_largest_half_is_kept():
    items = blocks({"o_proj": 8})
    items.low_rank[0, "o_proj"].a[0, 0] = 65504.0
    layout, pages = packed(items, target(torch.float16))
    assert unpacked(layout, pages, torch.float16)[0][0, 0] == 65504.0


def test_large_finite_values_are_kept():
    """Their sum overflows; each of them is a number."""
    items = blocks({"o_proj": 8})
    items.low_rank[0, "o_proj"].a.fill_(3e38)
    layout, pages = packed(items, target(torch.float32))
    assert bool((unpacked(layout, pages, torch.float32)[0] == 3e38).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_the_scaling_is_folded_in_and_rounded_once(stored, dtype):
    items = blocks({"o_proj": 8})
    key = (0, "o_proj")
    plain = items.low_rank[key]
    items.low_rank[key] = LowRank(0, "o_proj", plain.a.to(stored), plain.b.to(stored), scaling=1.7)
    layout, pages = packed(items, target(dtype))
    a, b = unpacked(layout, pages, dtype)
    assert torch.equal(a, plain.a.to(stored).to(dtype))
    assert torch.equal(b, (plain.b.to(stored).float() * 1.7).to(dtype))


def test_a_scaling_that_overflows_is_refused():
    items = blocks({"o_proj": 8})
    key = (0, "o_proj")
    items.low_rank[key] = LowRank(0, "o_proj", items.low_rank[key].a, items.low_rank[key].b, scaling=3e38)
    with pytest.raises(AdapterInvalid, match="layer 0 o_proj lora_B"):
        packed(items, target(torch.float32))


WIDE = (LoraSite(0, 0, "o_proj", 640, (LoraSlice("o_proj", 0, 384),)),)


@pytest.mark.parametrize("rank", [8, 16, 17, 40, 200])
@pytest.mark.parametrize("page_bytes", [2048, 6144, 20_000, 1 << 20])
def test_wide_weights_are_transposed_in_tiles(rank, page_bytes):
    """Pages of 2048 bytes cut panels by columns, those of 20,000 divide the runs of panels."""
    where = PackTarget(WIDE, torch.bfloat16, page_bytes)
    a, b = torch.randn(rank, 640).bfloat16(), torch.randn(384, rank).bfloat16()
    items = Blocks.of(Adapter((LowRank(0, "o_proj", a, b.T, 0.3),), "fingerprint"))
    layout = where.layout(items.shape(WIDE))
    out = torch.zeros(layout.num_pages, page_bytes, dtype=torch.uint8)
    pack([items], where, layout, out)
    found = unpacked(layout, out, torch.bfloat16)
    assert torch.equal(found[0], padded(a, torch.bfloat16))
    assert torch.equal(found[1], padded(b.T.float() * 0.3, torch.bfloat16))
