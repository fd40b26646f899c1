"""The backends of the CPU against the formula, over popularity x mixed ranks x odd sizes x dtype.

Covers `base.py`, `reference.py`, `torch_backend.py`, `cpp_backend.py`, `segment_loop.py`, `sites.py`, `table.py` too.
"""

import pytest
import torch
from cpp import NEEDS_CPP

from multilora.adapters.adapter import Adapter, LowRank, Vector, VectorKind
from multilora.adapters.packing.blocks import Blocks, PackTarget, pack
from multilora.batch import LoraSegment
from multilora.errors import ConfigError
from multilora.layers.experts import sort_by_expert
from multilora.lora.backends import make_lora_backend
from multilora.lora.reference import ReferenceLora
from multilora.lora.sites import LoraSite, LoraSlice
from multilora.lora.table import LoraTable

BACKENDS = ["reference", "torch", pytest.param("cpp", marks=NEEDS_CPP)]


def make_sites(hidden: int, q: int, kv: int, inter: int) -> tuple[LoraSite, ...]:
    qkv = (LoraSlice("q_proj", 0, q), LoraSlice("k_proj", q, kv), LoraSlice("v_proj", q + kv, kv))
    return (
        LoraSite(0, 0, "qkv_proj", hidden, qkv),
        LoraSite(1, 0, "o_proj", q, (LoraSlice("o_proj", 0, hidden),)),
        LoraSite(2, 0, "down_proj", inter, (LoraSlice("down_proj", 0, hidden),)),
    )


def random_adapter(sites, ranks: dict[str, int], seed: int) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    blocks = []
    for site in sites:
        for s in site.slices:
            if r := ranks.get(s.module, 0):
                a = torch.randn(r, site.in_features, generator=g) / site.in_features**0.5
                b = torch.randn(r, s.out_features, generator=g) / r**0.5
                blocks.append(LowRank(site.layer, s.module, a, b))
    return Adapter(tuple(blocks), "test")


class Bench:
    """An arena with adapters at scattered pages."""

    def __init__(self, sites, dtype, page_bytes, adapters):
        self.target = PackTarget(sites, dtype, page_bytes)
        packed = []
        for adapter in adapters:
            blocks = Blocks.of(adapter)
            layout = self.target.layout(blocks.shape(sites))
            buffer = torch.zeros(layout.num_pages, page_bytes, dtype=torch.uint8)
            pack([blocks], self.target, layout, buffer)
            packed.append((layout, buffer))
        total = sum(layout.num_pages for layout, _ in packed) + 3
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
        arena = torch.zeros(total, page_bytes, dtype=torch.uint8)
        self.table = LoraTable(arena, dtype, tuple(tuple(s.offset for s in site.slices) for site in sites))
        for slot, (layout, buffer) in enumerate(packed):
            pages = [order.pop() for _ in range(layout.num_pages)]
            arena[pages] = buffer
            self.table.install(slot, layout, pages)


def naive(y, x, site, adapters, segments):
    """The formula itself, from the unpacked blocks."""
    y = y.clone()
    for segment in segments:
        for slot, weight in zip(segment.slots, segment.weights, strict=True):
            blocks = Blocks.of(adapters[slot])
            for s in site.slices:
                if block := blocks.low_rank.get((site.layer, s.module)):
                    delta = weight * (x[segment.start : segment.end] @ block.a.T) @ block.b
                    y[segment.start : segment.end, s.offset : s.offset + s.out_features] += delta
    return y


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
POPULARITY = {
    "identical": [(0, 9, 0)],
    "distinct": [(i, i + 1, i) for i in range(6)],
    "uniform": [(0, 3, 0), (3, 6, 1), (6, 9, 2)],
    "skewed": [(0, 7, 4), (7, 8, 1), (8, 9, 5)],
    "some rows base": [(2, 3, 3), (5, 8, 0)],
}
RANKS = (1, 4, 8, 16, 64, 256)
SIZES = {"round": (64, 64, 32, 128), "odd": (48, 40, 24, 104)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("page_bytes", [2048, 65536], ids=["cut panels", "whole panels"])
def test_backend_equals_the_formula(backend, popularity, size, page_bytes):
    torch.manual_seed(1)
    sites = make_sites(*SIZES[size])
    adapters = [random_adapter(sites, dict.fromkeys(ALL, rank), seed=rank) for rank in RANKS]
    bench = Bench(sites, torch.float32, page_bytes, adapters)
    lora = (
        ReferenceLora(bench.table)
        if backend == "reference"
        else make_lora_backend(backend, bench.table, sites=sites, dtype=bench.target.dtype)
    )
    segments = tuple(LoraSegment(s, e, (p,), (1.0,)) for s, e, p in POPULARITY[popularity])
    lora.prepare(segments, 9)
    for site in sites:
        x, y = torch.randn(9, site.in_features), torch.randn(9, site.out_features)
        want = naive(y, x, site, adapters, segments)
        lora.apply(y, x, site.index)
        torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_subset_of_targets_and_composition(backend):
    torch.manual_seed(2)
    sites = make_sites(64, 64, 32, 128)
    adapters = [
        random_adapter(sites, {"q_proj": 4, "v_proj": 20}, seed=1),
        random_adapter(sites, {"k_proj": 8, "down_proj": 3}, seed=2),
    ]
    bench = Bench(sites, torch.float32, 4096, adapters)
    lora = (
        ReferenceLora(bench.table)
        if backend == "reference"
        else make_lora_backend(backend, bench.table, sites=sites, dtype=bench.target.dtype)
    )
    segments = (LoraSegment(0, 2, (0,), (1.0,)), LoraSegment(2, 5, (0, 1), (0.7, -0.3)))
    lora.prepare(segments, 5)
    for site in sites:
        x, y = torch.randn(5, site.in_features), torch.randn(5, site.out_features)
        want = naive(y, x, site, adapters, segments)
        lora.apply(y, x, site.index)
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_bytes", [2048, 65536], ids=["cut panels", "whole panels"])
def test_scale_shift_pairs_follow_the_low_rank_part(backend, page_bytes):
    """Scale and shift, with low rank or alone; rows of others stay as they are."""
    torch.manual_seed(4)
    sites = make_sites(48, 40, 24, 104)
    low = random_adapter(sites, {"q_proj": 4, "v_proj": 20}, seed=1)
    vectors = [
        Vector(0, module, kind, torch.randn(width))
        for module, width, kinds in (
            ("q_proj", 40, (VectorKind.MAGNITUDE,)),
            ("k_proj", 24, (VectorKind.BIAS,)),
            ("v_proj", 24, (VectorKind.MAGNITUDE, VectorKind.BIAS)),
            ("o_proj", 48, (VectorKind.BIAS,)),
        )
        for kind in kinds
    ]
    adapters = [Adapter((*low.blocks, *vectors), "test"), random_adapter(sites, dict.fromkeys(ALL, 8), seed=2)]
    bench = Bench(sites, torch.float32, page_bytes, adapters)
    lora = (
        ReferenceLora(bench.table)
        if backend == "reference"
        else make_lora_backend(backend, bench.table, sites=sites, dtype=bench.target.dtype)
    )
    segments = (LoraSegment(1, 3, (0,), (1.0,)), LoraSegment(3, 5, (1,), (1.0,)))
    lora.prepare(segments, 6)
    for site in sites:
        x, y = torch.randn(6, site.in_features), torch.randn(6, site.out_features)
        want = naive(y, x, site, adapters, segments)
        for vector in sorted(vectors, key=lambda v: v.kind is VectorKind.BIAS):
            for s in site.slices:
                if s.module == vector.module:
                    rows = want[1:3, s.offset : s.offset + s.out_features]
                    if vector.kind is VectorKind.BIAS:
                        rows += vector.value
                    else:
                        rows *= vector.value
        lora.apply(y, x, site.index)
        torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("rows", [2, 12])  # few ones go through fp32
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_reference(dtype, rows, backend):
    torch.manual_seed(3)
    sites = make_sites(64, 64, 32, 128)
    adapters = [random_adapter(sites, dict.fromkeys(ALL, r), seed=r) for r in (4, 16, 64)]
    bench = Bench(sites, dtype, 8192, adapters)
    segments = tuple(LoraSegment(rows * i, rows * (i + 1), (i,), (0.5,)) for i in range(3))
    backend, reference = (
        make_lora_backend(backend, bench.table, sites=sites, dtype=bench.target.dtype),
        ReferenceLora(bench.table),
    )
    for lora in (backend, reference):
        lora.prepare(segments, 3 * rows)
    for site in sites:
        x, y = (torch.randn(3 * rows, size).to(dtype) for size in (site.in_features, site.out_features))
        want = y.clone()
        backend.apply(y, x, site.index)
        reference.apply(want, x, site.index)
        error = (y - want).float().norm() / want.float().norm()
        assert error < 3e-2 if dtype is torch.bfloat16 else error < 4e-3


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_sees_adapters_that_went_came_and_moved(dtype):
    """A slot has another adapter, later the whole arena is elsewhere, as after a sleep: same bits as from scratch."""
    sites = make_sites(48, 40, 24, 104)
    adapters = [random_adapter(sites, dict.fromkeys(ALL, r), seed=r) for r in (4, 16, 40)]
    bench = Bench(sites, dtype, 2048, adapters)
    lora = make_lora_backend("cpp", bench.table, sites=sites, dtype=dtype)
    segments = (LoraSegment(0, 2, (0,), (0.5,)), LoraSegment(2, 5, (1, 0), (1.0, -2.0)))

    def outputs(backend):
        torch.manual_seed(4)
        backend.prepare(segments, 6)
        found = []
        for site in sites:
            x, y = (torch.randn(6, size).to(dtype) for size in (site.in_features, site.out_features))
            backend.apply(y, x, site.index)
            found.append(y)
        return found

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    first = outputs(lora)
    layout, pages = bench.table.lookup(2)
    for slot in (0, 2):
        bench.table.remove(slot)
    bench.table.install(0, layout, pages)
    second = outputs(lora)
    assert not same(second, first)
    assert same(second, outputs(make_lora_backend("cpp", bench.table, sites=sites, dtype=dtype)))

    arena, at, others = bench.table.weights, bench.table.weights.data_ptr(), []
    storage, held = arena.untyped_storage(), arena.clone()
    size = storage.nbytes()
    while arena.data_ptr() in (0, at):
        storage.resize_(0)
        others.append(torch.full((size,), 255, dtype=torch.uint8))  # keeps the arena from where it was
        storage.resize_(size)
    arena.copy_(held)
    assert same(outputs(lora), second)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_gives_a_row_the_same_bits_in_any_company(dtype):
    """Alone, among others of its adapter, and beside a segment so long that torch multiplies it."""
    torch.manual_seed(5)
    sites = make_sites(64, 64, 32, 128)
    bench = Bench(sites, dtype, 8192, [random_adapter(sites, dict.fromkeys(ALL, r), seed=r) for r in (8, 16)])
    lora = make_lora_backend("cpp", bench.table, sites=sites, dtype=dtype)
    batches = [
        (LoraSegment(0, 1, (0,), (0.7,)),),
        (LoraSegment(0, 7, (0,), (0.7,)), LoraSegment(7, 9, (1,), (1.0,))),
        (LoraSegment(0, 64, (0,), (0.7,)), LoraSegment(64, 164, (1,), (1.0,))),
    ]
    reference = ReferenceLora(bench.table)
    reference.prepare((LoraSegment(0, 100, (1,), (1.0,)),), 100)
    for site in sites:
        x, y = (torch.randn(164, size).to(dtype) for size in (site.in_features, site.out_features))
        found = []
        for segments in batches:
            rows = segments[-1].end
            lora.prepare(segments, rows)
            own = y[:rows].clone()
            lora.apply(own, x[:rows].contiguous(), site.index)
            found.append(own)
        assert not torch.equal(found[0][0], y[0])
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[1][:7], found[2][:7])
        long = y[64:].clone()
        reference.apply(long, x[64:].contiguous(), site.index)
        torch.testing.assert_close(found[2][64:], long, atol=1e-4 if dtype is torch.float32 else 5e-2, rtol=1e-2)


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ConfigError, match="csgmv2"):
        make_lora_backend("csgmv2", None, sites=(), dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_bytes", [1024, 65536], ids=["cut panels", "whole panels"])
def test_experts_equal_the_formula(backend, page_bytes):
    """Several adapters and ranks, matrices that experts share, composed adapters and base rows."""
    torch.manual_seed(3)
    count, tokens, top_k = 4, 9, 2
    site = LoraSite(0, 0, "experts.down_proj", 24, (LoraSlice("experts.down_proj", 0, 40),), count)
    adapters = []
    for rank, of_a, of_b in ((3, count, count), (8, 1, count), (12, count, 1)):
        a, b = torch.randn(of_a, rank, 24) / 5, torch.randn(of_b, rank, 40) / rank**0.5
        adapters.append(Adapter((LowRank(0, "experts.down_proj", a, b, 1.5),), "test"))
    bench = Bench((site,), torch.float32, page_bytes, adapters)
    assert [len(bench.table.lookup(slot)[0].shape.shared) for slot in range(3)] == [0, 1, 1]
    lora = (
        ReferenceLora(bench.table)
        if backend == "reference"
        else make_lora_backend(backend, bench.table, sites=(site,), dtype=bench.target.dtype)
    )
    segments = (LoraSegment(0, 4, (0,), (1.0,)), LoraSegment(5, 9, (1, 2), (0.5, -2.0)))
    lora.prepare(segments, tokens)
    taken = torch.rand(tokens, count).topk(top_k).indices
    rows = sort_by_expert(taken, count, lora.expert_segments())
    x, y = torch.randn(tokens * top_k, 24), torch.randn(tokens * top_k, 40)
    want = y.clone()
    for row, (token, expert) in enumerate(zip(rows.tokens.tolist(), rows.experts.tolist(), strict=True)):
        for segment in (s for s in segments if s.start <= token < s.end):
            for slot, weight in zip(segment.slots, segment.weights, strict=True):
                [block] = adapters[slot].blocks
                a, b = (m[expert if len(m) > 1 else 0] for m in (block.a, block.b))
                want[row] += weight * 1.5 * (x[row] @ a.T) @ b
    lora.apply_experts(y, x, site.index, rows)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)
    lora.prepare((), tokens)
    assert lora.expert_segments() is None
