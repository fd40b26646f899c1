"""The Triton kernels of experts against the reference: popularity x ranks x shared matrices x composed adapters.

Covers `triton_expert_kernels.py` too.
"""

import pytest
import torch

pytest.importorskip("triton")

from lora_world import BLOCKS, DEVICE, GPU_ONLY, INTERPRETED_SLOW, TOLERANCE, World, segments_of

from multilora.batch import LoraSegment
from multilora.layers.experts import sort_by_expert
from multilora.lora.panels import AdapterShape, PanelGeometry, make_layout
from multilora.lora.reference import ReferenceLora
from multilora.lora.sites import LoraSite, LoraSlice
from multilora.lora.table import LoraTable
from multilora.lora.triton_backend import TritonLora

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
EXPERTS, TOP_K = 3, 2
SITES = (
    LoraSite(0, 0, "q_proj", 40, (LoraSlice("q_proj", 0, 40),)),
    LoraSite(1, 0, "experts.gate_up_proj", 40, (LoraSlice("experts.gate_up_proj", 0, 48),), EXPERTS),
    LoraSite(2, 0, "experts.down_proj", 24, (LoraSlice("experts.down_proj", 0, 40),), EXPERTS),
)
ALL, NONE, ONE = ((8,), (8,), (8,)), ((16,), (0,), (0,)), ((0,), (0,), (24,))
SHAPES = [
    AdapterShape(ALL),
    AdapterShape(NONE),
    AdapterShape(ONE),
    AdapterShape(((0,), (16,), (8,)), shared=frozenset({(1, -1), (2, 0)})),
]
POPULARITY = {
    "identical": segments_of((0, 5, 0)),
    "distinct": segments_of((0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 3)),
    "some rows base": segments_of((1, 3, 3), (4, 5, 0)),
    "composed": (LoraSegment(0, 3, (0, 2, 3), (0.5, -1.0, 2.0)), LoraSegment(3, 4, (1,), (1.0,))),
    "none on experts": segments_of((1, 4, 1)),
}


class Experts:
    """Adapters of SHAPES with random weights in scattered pages, and rows sorted by expert and segment."""

    def __init__(self, dtype: torch.dtype = torch.float32, page_bytes: int = 65536):
        layouts = [make_layout(SITES, shape, PanelGeometry(page_bytes, dtype.itemsize)) for shape in SHAPES]
        total = sum(layout.num_pages for layout in layouts) + 2
        g = torch.Generator().manual_seed(0)
        free = torch.randperm(total, generator=g).tolist()
        arena = torch.randn(total, page_bytes // dtype.itemsize, generator=g) / 8
        self.dtype = dtype
        offsets = tuple(tuple(s.offset for s in site.slices) for site in SITES)
        self.table = LoraTable(arena.to(dtype).view(torch.uint8).to(DEVICE), dtype, offsets)
        for slot, layout in enumerate(layouts):
            self.table.install(slot, layout, [free.pop() for _ in range(layout.num_pages)])
        self.reference = ReferenceLora(self.table)

    def check(self, backend: TritonLora, segments: tuple[LoraSegment, ...], tokens: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        taken = torch.rand(tokens, EXPERTS, generator=g).topk(TOP_K).indices.to(DEVICE)
        for lora in (self.reference, backend):
            lora.prepare(segments, tokens)
        numbers = backend.expert_segments()
        expected = self.reference.expert_segments()
        assert (numbers is None) == (expected is None)
        if numbers is None or expected is None:
            return
        assert torch.equal(numbers.cpu(), expected.cpu())
        rows = sort_by_expert(taken, EXPERTS, numbers)
        changed = False
        for site in SITES[1:]:
            x = torch.randn(tokens * TOP_K, site.in_features, generator=g).to(DEVICE, self.dtype)
            y = torch.randn(tokens * TOP_K, site.out_features, generator=g).to(DEVICE, self.dtype)
            got, want = y.clone(), y.to(torch.float32, copy=True)
            backend.apply_experts(got, x, site.index, rows)
            self.reference.apply_experts(want, x.float(), site.index, rows)
            changed |= not torch.equal(want, y.float())
            assert (got.float() - want).norm() / want.norm() < TOLERANCE[self.dtype]
            assert torch.equal(got[numbers[rows.tokens] == 0], y[numbers[rows.tokens] == 0])  # base rows: not a bit
        assert changed


@pytest.fixture(scope="module")
def world() -> Experts:
    return Experts()


@pytest.mark.parametrize(
    ("name", "popularity"),
    [
        *(
            pytest.param("csgmv", one, marks=INTERPRETED_SLOW if one in ("identical", "distinct") else ())
            for one in POPULARITY
        ),
        pytest.param("triton", "composed", marks=INTERPRETED_SLOW),
    ],
)
def test_small_steps(world: Experts, name: str, popularity: str) -> None:
    backend = TritonLora(world.table, SITES, name=name, tuning=BLOCKS, graph_rows=16)
    world.check(backend, POPULARITY[popularity], 6)
    assert backend.replayable


@pytest.mark.parametrize("popularity", ["composed", "none on experts"])
def test_large_steps(world: Experts, popularity: str) -> None:
    """Beyond GRAPH_ROWS the tables are the step's own."""
    backend = TritonLora(world.table, SITES, tuning=BLOCKS, graph_rows=4)
    world.check(backend, POPULARITY[popularity], 6)
    assert not backend.replayable


@pytest.mark.slow
def test_many_rows_of_one_expert_and_adapter(world: Experts) -> None:
    """Groups of several tiles, which begin anywhere in a tile."""
    backend = TritonLora(world.table, SITES, tuning=BLOCKS, graph_rows=64)
    world.check(backend, segments_of((1, 50, 0)), 52)


def test_panels_that_are_cut() -> None:
    world = Experts(page_bytes=512)
    backend = TritonLora(world.table, SITES, tuning=BLOCKS, graph_rows=16)
    assert world.table.lookup(0)[0].positions.shape[0] > 4 * EXPERTS
    world.check(backend, POPULARITY["some rows base"], 6)


def test_a_rank_beyond_the_fixed_intermediate_takes_its_own(world: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multilora.lora.triton_backend.H_BYTES", 1024)
    backend = TritonLora(world.table, SITES, tuning=BLOCKS, graph_rows=16)
    for seed in range(2):  # how many experts a token takes is not known at first
        world.check(backend, segments_of((0, 5, 2)), 5, seed)
    assert not backend.replayable


def test_steps_before_a_capture_take_any_adapters(world: Experts) -> None:
    """Empty segments stand for any: rows have segments, which are none so far."""
    backend = TritonLora(world.table, SITES, tuning=BLOCKS, graph_rows=16)
    backend.prepare((), 9)
    numbers = backend.expert_segments()
    assert numbers is not None
    assert numbers.tolist() == [0] * 9
    assert backend.replayable
    backend.prepare(segments_of((2, 4, 0)), 9)  # a replay reads the same memory
    assert numbers.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0]
    backend.prepare(segments_of((2, 4, 1)), 9)  # this one does nothing to experts, but a graph would ask
    assert (backend.expert_segments(), backend.replayable) == (None, True)
    assert numbers.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_a_model_without_experts_has_no_segments() -> None:
    world = World(SITES[:1], [((8,),)])
    world.install(0)
    backend = world.backend()
    backend.prepare(segments_of((0, 2, 0)), 4)
    assert backend.expert_segments() is None


@GPU_ONLY
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    world = Experts(dtype)
    backend = TritonLora(world.table, SITES, tuning=BLOCKS)
    for popularity in POPULARITY.values():
        world.check(backend, popularity, 6)


@GPU_ONLY
@pytest.mark.gpu
def test_one_graph_serves_other_adapters_and_other_experts() -> None:
    world = Experts(torch.bfloat16)
    backend = TritonLora(world.table, SITES, tuning=BLOCKS)
    site, tokens = SITES[1], 6
    taken = torch.zeros(tokens, TOP_K, dtype=torch.int64, device=DEVICE)
    x = torch.randn(tokens * TOP_K, site.in_features, device=DEVICE, dtype=torch.bfloat16)
    y = torch.zeros(tokens * TOP_K, site.out_features, device=DEVICE, dtype=torch.bfloat16)

    def run() -> None:
        rows = sort_by_expert(taken, EXPERTS, backend.expert_segments())
        backend.apply_experts(y, x, site.index, rows)

    backend.prepare((), tokens)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed, segments in enumerate(POPULARITY.values()):
        backend.prepare(segments, tokens)
        world.reference.prepare(segments, tokens)
        taken.copy_(torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)).topk(TOP_K).indices)
        y.zero_()
        graph.replay()
        want = torch.zeros_like(y, dtype=torch.float32)
        if (numbers := world.reference.expert_segments()) is not None:
            rows = sort_by_expert(taken, EXPERTS, numbers)
            world.reference.apply_experts(want, x.float(), site.index, rows)
        assert (y.float() - want).norm() <= 1e-2 * want.norm()
