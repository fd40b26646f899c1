"""The kernels against the reference: interpreted on CPU (fp32, fp16), compiled where there is a GPU (bf16 too).

Covers `triton_kernels.py`, `triton_panels.py`, `device_table.py`, `tuning.py` too.
"""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from compilers import compile_elsewhere
from lora_world import BLOCKS, DEVICE, GPU_ONLY, INTERPRETED_SLOW, TOLERANCE, World, same_rank, segments_of

from multilora.batch import LoraSegment
from multilora.errors import ConfigError
from multilora.lora.backends import make_lora_backend
from multilora.lora.panels import AdapterShape, PanelGeometry, ScaleShift, make_layout
from multilora.lora.reference import ReferenceLora
from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice
from multilora.lora.table import LoraTable
from multilora.lora.triton_backend import TritonLora
from multilora.lora.triton_kernels import expand_kernel, shrink_kernel
from multilora.lora.tuning import MEDIUM_ROWS

RANKS = (1, 4, 8, 16, 64, 256)
LARGE = 91 * 10**9  # bytes of an arena
ROUND, ODD = (64, 48, 32, 96), (40, 42, 24, 104)


def make_sites(hidden: int, q: int, kv: int, inter: int) -> tuple[LoraSite, ...]:
    qkv = (LoraSlice("q_proj", 0, q), LoraSlice("k_proj", q, kv), LoraSlice("v_proj", q + kv, kv))
    return (
        LoraSite(0, 0, "qkv_proj", hidden, qkv),
        LoraSite(1, 0, "down_proj", inter, (LoraSlice("down_proj", 0, hidden),)),
    )


POPULARITY = {
    "identical": segments_of((0, 9, 0)),
    "distinct": segments_of(*((i, i + 1, i) for i in range(6))),
    "uniform": segments_of((0, 3, 0), (3, 6, 1), (6, 9, 2)),
    "skewed": segments_of((0, 7, 4), (7, 8, 1), (8, 9, 5)),
    "some rows base": segments_of((2, 3, 3), (5, 8, 0)),
}


QUICK = {("some rows base", "csgmv")}
"""By 'triton', mixed ranks and single rows: `test_scale_shift_pairs`, `test_subsets_of_targets_and_composition`."""
KINDS = [(popularity, name) for popularity in POPULARITY for name in ("triton", "csgmv")]


@pytest.mark.parametrize(
    ("popularity", "name"), [pytest.param(*kind, marks=() if kind in QUICK else INTERPRETED_SLOW) for kind in KINDS]
)
def test_popularity_and_mixed_ranks(popularity, name):
    sites = make_sites(*ROUND)
    world = World(sites, [same_rank(sites, rank) for rank in RANKS])
    for slot in range(len(RANKS)):
        world.install(slot)
    world.check(world.backend(name), POPULARITY[popularity], 9)


@pytest.mark.parametrize(
    ("page_bytes", "dtype"),
    [
        (65536, torch.float32),
        (512, torch.float16),  # cut panels
        pytest.param(65536, torch.float16, marks=INTERPRETED_SLOW),
        pytest.param(512, torch.float32, marks=INTERPRETED_SLOW),
        *(pytest.param(size, torch.bfloat16, marks=GPU_ONLY) for size in (512, 65536)),
    ],
)
def test_odd_widths_dtypes_and_cut_panels(page_bytes, dtype):
    sites = make_sites(*ODD)
    world = World(sites, [same_rank(sites, rank) for rank in (8, 20, 3)], dtype=dtype, page_bytes=page_bytes)
    for slot in range(3):
        world.install(slot)
    segments = segments_of((0, 1, 0), (1, 2, 1), (2, 7, 2))
    world.check(world.backend("csgmv"), segments, 8)


@pytest.mark.parametrize("name", ["triton", pytest.param("csgmv", marks=INTERPRETED_SLOW)])
def test_subsets_of_targets_and_composition(name):
    sites = make_sites(*ROUND)
    world = World(sites, [((4, 0, 20), (0,)), ((0, 8, 0), (3,)), ((16, 16, 16), (16,))])
    for slot in range(3):
        world.install(slot)
    segments = (
        LoraSegment(0, 1, (0,), (0.5,)),
        LoraSegment(1, 2, (1, 2, 0), (0.7, -0.3, 1.1)),
        LoraSegment(3, 6, (2, 1), (1.0, 2.0)),
        LoraSegment(6, 7, (1,), (1.0,)),
    )
    world.check(world.backend(name), segments, 8)


def test_segments_longer_than_a_tile_and_large_steps():
    sites = make_sites(*ROUND)
    world = World(sites, [same_rank(sites, 8), same_rank(sites, 24)])
    for slot in range(2):
        world.install(slot)
    backend = world.backend("csgmv", graph_rows=16)
    world.check(backend, segments_of((0, 1, 1), (1, 34, 0), (34, 36, 1)), 40)
    assert not backend.replayable  # more rows than graphs have
    world.check(backend, segments_of((0, 1, 1), (1, 4, 0)), 16)
    assert backend.replayable
    world.check(world.backend("csgmv", graph_rows=16, chunk_rows=32), segments_of((0, 1, 1), (1, 36, 0)), 40)


@pytest.mark.parametrize(
    "page_bytes", [pytest.param(512, marks=INTERPRETED_SLOW), pytest.param(65536, marks=INTERPRETED_SLOW)]
)
def test_one_to_five_rows_of_an_adapter_in_a_medium_step(page_bytes):
    """Up to `few_rows` of them take tiles of their own, more share one, whose columns several programs divide."""
    sites = make_sites(*ROUND)
    ranks = [same_rank(sites, 8), same_rank(sites, 40), ((4, 0, 20), (0,)), same_rank(sites, 16)]
    pairs = [(), (), (), ((PAIR, 0, PAIR), (PAIR,))]
    world = World(sites, ranks, scale_shift=pairs, page_bytes=page_bytes)
    for slot in range(4):
        world.install(slot)
    lengths = (1, 2, 3, 4, 5, 1, 2, 4, 3)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    segments = segments_of(*((end - n, end, i % 4) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))))
    composed = LoraSegment(ends[-1], ends[-1] + 2, (0, 1), (0.5, -1.0))
    backend = world.backend("csgmv")
    for few_rows, parts in ((1, 8), (2, 1)):
        backend.tuning = replace(BLOCKS, medium=replace(BLOCKS.medium, few_rows=few_rows, parts=parts))
        world.check(backend, (*segments, composed), MEDIUM_ROWS)
        assert backend.replayable


PAIR = int(ScaleShift.DORA | ScaleShift.BIAS)


QUICK_PAIRS = {("triton", 1024, 16), ("csgmv", 65536, 8)}
PAIRS = [(name, nbytes, rows) for name in ("triton", "csgmv") for nbytes in (1024, 65536) for rows in (16, 8)]


@pytest.mark.parametrize(
    ("name", "page_bytes", "graph_rows"),
    [pytest.param(*pair, marks=() if pair in QUICK_PAIRS else INTERPRETED_SLOW) for pair in PAIRS],
)
def test_scale_shift_pairs(name, page_bytes, graph_rows):
    """Cut and whole panels, small and large steps; with a rank and without, beside plain adapters and base rows."""
    sites = make_sites(*ODD)
    ranks = [((8, 0, 20), (4,)), ((0, 0, 0), (0,)), same_rank(sites, 16), ((0, 0, 8), (0,))]
    scale_shift = [((PAIR, 0, PAIR), (0,)), ((PAIR, PAIR, 0), (PAIR,)), (), ((0, PAIR, 0), (PAIR,))]
    world = World(sites, ranks, scale_shift=scale_shift, page_bytes=page_bytes)
    for slot in range(4):
        world.install(slot)
    singles = [(i, i + 1, i) for i in range(4)]
    backend = world.backend(name, graph_rows=graph_rows)
    world.check(backend, segments_of(*singles, (4, 7, 0), (7, 9, 1), (10, 11, 3)), 12)


def test_logits_are_fp32_whatever_the_weights_are():
    head = LoraSite(0, MODEL_LEVEL, "lm_head", 64, (LoraSlice("lm_head", 0, 200),))
    world = World((head,), [((8,),), ((0,),)], scale_shift=[(), ((PAIR,),)], dtype=torch.float16, page_bytes=2048)
    for slot in range(2):
        world.install(slot)
    got = world.check(world.backend(), segments_of((0, 1, 0), (1, 4, 0), (4, 5, 1)), 6, y_dtype=torch.float32)
    assert got[0].dtype == torch.float32


def test_the_vocabulary_as_an_input_needs_no_room():
    """LoRA on token embeddings does not pass through a backend: its width must not cost any intermediate."""
    embed = LoraSite(2, MODEL_LEVEL, "embed_tokens", 1 << 24, (LoraSlice("embed_tokens", 0, 32),))
    sites = (*make_sites(*ROUND), embed)
    world = World(sites, [((64, 64, 64), (64,), (0,))])
    world.install(0)
    backend = world.backend()
    backend.prepare(segments_of((0, 200, 0)), 200)
    assert backend.replayable


def test_sites_that_no_adapter_touches_are_not_launched(monkeypatch):
    sites = make_sites(*ROUND)
    world = World(sites, [((0, 8, 0), (0,)), ((0, 0, 0), (0,))], scale_shift=[(), ((0, PAIR, 0), (0,))])
    for slot in range(2):
        world.install(slot)
    backend, launched = world.backend(), []
    monkeypatch.setattr("multilora.kernels.triton_launch.launch", lambda kernel, *_, **__: launched.append(kernel))
    x, y = torch.zeros(2, 96), torch.zeros(2, 112)

    def launches(segments):
        launched.clear()
        backend.prepare(segments, 2)
        backend.apply(y[:, :112].contiguous(), x[:, :64].contiguous(), 0)
        backend.apply(y[:, :64].contiguous(), x, 1)
        return list(launched)

    assert launches(segments_of((0, 1, 0))) == [shrink_kernel, expand_kernel]
    assert launches(segments_of((0, 1, 1))) == [expand_kernel]
    assert launches(()) == [shrink_kernel, expand_kernel] * 2  # to be captured


def test_an_intermediate_too_large_for_the_fixed_buffer(monkeypatch):
    monkeypatch.setattr("multilora.lora.triton_backend.H_BYTES", 1024)
    sites = make_sites(*ROUND)
    world = World(sites, [same_rank(sites, 64)])
    world.install(0)
    backend = world.backend()
    world.check(backend, segments_of((0, 3, 0)), 4)
    assert not backend.replayable


def test_rows_after_a_shorter_step_are_left_alone():
    """The tables of a step of N rows forget the tiles of the one before."""
    sites = make_sites(*ROUND)
    world = World(sites, [same_rank(sites, 8)])
    world.install(0)
    backend = world.backend()
    world.check(backend, segments_of(*((i, i + 1, 0) for i in range(4))), 4)
    world.check(backend, segments_of((1, 2, 0)), 4)


def test_adapters_come_and_go_and_their_tables_are_compacted():
    sites = make_sites(*ROUND)
    ranks = [same_rank(sites, rank) for rank in (8, 8, 8, 24)]
    world = World(sites, ranks, spare_pages=0)
    backend = world.backend()
    for slot in range(3):
        world.install(slot)
    panels = len(world.layouts[0].positions)
    backend._table._intervals.size = panels * 5 + panels // 2  # a gap of one adapter, then room for 2.5
    gone = world.table.lookup(1)[1]
    world.table.remove(1)
    world.free += gone
    world.install(1, which=3)  # three: fits nowhere unless the gap is closed
    assert backend._table._installed[2].first == panels, "the gap has not been closed"
    world.check(backend, segments_of((0, 1, 0), (1, 3, 1), (3, 4, 2)), 4)


def test_the_same_bits_every_time():
    sites = make_sites(*ROUND)
    world = World(sites, [same_rank(sites, 24), same_rank(sites, 8)], dtype=torch.float16)
    for slot in range(2):
        world.install(slot)
    backend = world.backend()
    segments = segments_of((0, 1, 0), (1, 4, 1))
    for a, b in zip(world.check(backend, segments, 4), world.check(backend, segments, 4), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def room(monkeypatch):
    """For three segments of several rows, three single rows: all programs are interpreted."""
    for name in ("CAPTURED_SEGMENTS", "CAPTURED_SINGLES"):
        monkeypatch.setattr(f"multilora.lora.triton_steps.{name}", 3)
    monkeypatch.setattr("multilora.lora.triton_backend.CAPTURED_SINGLES", 3)


@pytest.mark.parametrize("name", ["csgmv", pytest.param("triton", marks=INTERPRETED_SLOW)])
def test_large_steps_that_are_captured(room, name):
    """Single rows, tiles that are not full, rows of several adapters, base rows; then others by the same tables."""
    sites = make_sites(*ROUND)
    world = World(sites, [same_rank(sites, rank) for rank in (8, 20, 40)])
    for slot in range(3):
        world.install(slot)
    backend = world.backend(name, graph_rows=4, chunk_rows=16)
    backend.prepare((), 48, captured=True)
    assert backend.replayable
    composed = LoraSegment(30, 33, (2, 0), (0.5, 1.5))
    for segments in (
        (*segments_of((0, 1, 2), (1, 2, 0), (3, 23, 1)), composed),
        segments_of((0, 40, 2)),
        segments_of((47, 48, 1)),
    ):
        world.check(backend, segments, 48, captured=True)
        assert backend.replayable
    world.check(backend, segments_of((0, 17, 0)), 32, captured=True)
    assert backend.replayable


def test_captured_decodes_take_the_way_of_small_steps(room):
    sites = make_sites(*ROUND)
    world = World(sites, [same_rank(sites, rank) for rank in (8, 20)])
    for slot in range(2):
        world.install(slot)
    backend = world.backend(graph_rows=4, decode_rows=12)
    for rows, segments in ((12, segments_of(*((i, i + 1, i % 2) for i in range(9)))), (9, segments_of((2, 8, 1)))):
        for lora in (backend, world.reference):
            lora.prepare(segments, rows, captured=True, decodes=True)
        assert backend.replayable and len(backend._step.groups) == 1 and backend._step.groups[0].grid == rows
        x, y = torch.randn(rows, 64, device=DEVICE), torch.zeros(rows, 112, device=DEVICE)
        got, want = y.clone(), y.clone()
        backend.apply(got, x, 0)
        world.reference.apply(want, x, 0)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    backend.prepare((), 13, captured=True, decodes=True)
    assert not backend.replayable
    backend.prepare((), 48, captured=True)  # whatever came before, prompts have the largest tables
    assert backend.replayable


def test_what_is_launched_in_captured_steps_depends_on_no_segment(room, monkeypatch):
    """Grids, addresses and constants, so that a graph captured before serves them all."""
    sites = make_sites(*ROUND)
    world = World(sites, [same_rank(sites, 8), same_rank(sites, 40), ((8, 0, 0), (0,))])
    for slot in range(3):
        world.install(slot)
    backend, launched = world.backend(graph_rows=4), []

    def note(kernel, grid, args, constants, **options):
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        launched.append((kernel, grid, addresses, constants, options))

    monkeypatch.setattr("multilora.kernels.triton_launch.launch", note)
    x, y = torch.zeros(40, 96), torch.zeros(40, 112)
    site_x, site_y = x[:, :64].contiguous(), y[:, :64].contiguous()

    def launches(segments):
        launched.clear()
        backend.prepare(segments, 40, captured=True)
        assert backend.replayable
        backend.apply(y, site_x, 0)
        backend.apply(site_y, x, 1)
        return list(launched)

    captured = launches(())
    assert [kernel for kernel, *_ in captured] == [shrink_kernel, shrink_kernel, expand_kernel, expand_kernel] * 2
    for segments in (segments_of((0, 1, 0), (1, 40, 1)), segments_of((3, 5, 2)), segments_of((9, 10, 1))):
        assert launches(segments) == captured


@pytest.mark.parametrize(
    ("segments", "why"),
    [
        (segments_of(*((i, i + 1, i % 2) for i in range(4))), "single rows"),
        pytest.param(
            segments_of(*((i, i + 2, i // 2 % 2) for i in range(0, 40, 2))), "segments", marks=INTERPRETED_SLOW
        ),
        ((LoraSegment(0, 3, (0, 1, 0), (1.0, 1.0, 1.0)),), "adapters"),
    ],
)
def test_what_does_not_fit_a_captured_step_is_launched_by_itself(room, monkeypatch, segments, why):
    monkeypatch.setattr("multilora.lora.triton_steps.FURTHER", 1)
    sites = make_sites(*ROUND)
    world = World(sites, [same_rank(sites, 8), same_rank(sites, 16)])
    for slot in range(2):
        world.install(slot)
    backend = world.backend(graph_rows=4, chunk_rows=16)
    backend.prepare((), 40, captured=True)
    world.check(backend, segments, 40, captured=True)
    assert not backend.replayable, why
    world.check(backend, segments_of((0, 30, 1)), 40, captured=True)
    assert backend.replayable


def test_without_a_gpu_the_backend_is_refused_by_name(monkeypatch):
    sites = make_sites(*ROUND)
    table = LoraTable(torch.zeros(1, 65536, dtype=torch.uint8), torch.float32, ((0, 48, 80), (0,)))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="csgmv needs a CUDA device"):
        make_lora_backend("csgmv", table, sites=sites, dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [7, 48, 600], ids=["starting early", "beside the product", "large"])
def test_a_graph_serves_other_adapters_and_other_ranks(rows):
    sites = make_sites(1024, 1024, 256, 4096)
    ranks = [same_rank(sites, rank) for rank in (8, 16, 64, 32)]
    world = World(sites, ranks, dtype=torch.bfloat16, page_bytes=1 << 20)
    world.install(0)
    backend = TritonLora(world.table, sites)
    x = [torch.randn(rows, site.in_features, device=DEVICE, dtype=torch.bfloat16) for site in sites]
    y = [torch.zeros(rows, site.out_features, device=DEVICE, dtype=torch.bfloat16) for site in sites]

    def step():
        for site in sites:
            backend.begin()
            y[site.index].zero_()  # the layer's own product
            backend.apply(y[site.index], x[site.index], site.index)

    backend.prepare((), rows, captured=True)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for slot in (1, 2, 3):
        world.install(slot)
    many = segments_of((0, 1, 1), (1, 2, 2), (2, 7, 3), *[(7, rows, 1)] * (rows > 7))
    for segments in (many, segments_of((5, 6, 2))):
        backend.prepare(segments, rows, captured=True)
        assert backend.replayable
        graph.replay()
        replayed = [t.clone() for t in y]
        step()
        world.reference.prepare(segments, rows)
        for site in sites:
            want = torch.zeros(rows, site.out_features, device=DEVICE)
            world.reference.apply(want, x[site.index].float(), site.index)
            assert torch.equal(replayed[site.index], y[site.index])
            assert (y[site.index].float() - want).norm() / want.norm() < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_pages_at_the_end_of_a_large_arena():
    """Elements beyond 2^35, bytes beyond 90 GB."""
    sites, page_bytes = make_sites(1024, 1024, 256, 4096), 1 << 20
    count, most = LARGE // page_bytes, torch.cuda.mem_get_info()[0] - (8 << 30)  # tables take some, too
    if most < LARGE:
        pytest.skip(f"needs 91 GB of free device memory, here are {most / 1e9:.0f}")
    arena = torch.empty(count, page_bytes, dtype=torch.uint8, device=DEVICE)
    table = LoraTable(arena, torch.bfloat16, tuple(tuple(s.offset for s in site.slices) for site in sites))
    layout = make_layout(sites, AdapterShape(same_rank(sites, 16)), PanelGeometry(page_bytes, 2))
    arena[-layout.num_pages :].view(torch.bfloat16).normal_(std=0.1)
    table.install(count - 1, layout, list(range(count - layout.num_pages, count)))  # the last slot, too
    backend, reference = TritonLora(table, sites, graph_rows=16), ReferenceLora(table)
    for segments, rows in (
        (segments_of((0, 1, count - 1), (1, 9, count - 1)), 9),
        (segments_of((2, 40, count - 1)), 40),
    ):
        for lora in (backend, reference):
            lora.prepare(segments, rows)
        for site in sites:
            x = torch.randn(rows, site.in_features, device=DEVICE, dtype=torch.bfloat16)
            got = torch.zeros(rows, site.out_features, device=DEVICE, dtype=torch.bfloat16)
            want = got.float()
            backend.apply(got, x, site.index)
            reference.apply(want, x.float(), site.index)
            assert want.any() and (got.float() - want).norm() / want.norm() < TOLERANCE[torch.bfloat16]


KERNELS = [
    f"{name} {phase} {kernel} bf16 {capability}"
    for name in ("CSGMV", "TRITON")
    for phase in ("small", "medium", "large")
    for kernel in ("shrink", "expand", *(["gated"] if (name, phase) == ("CSGMV", "large") else []))
    for capability in (80, 90)
]


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_with_the_committed_block_sizes():
    lines = compile_elsewhere("compile_lora.py", lines="\n".join(KERNELS))
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [" ".join(one["case"]) for one in found] == KERNELS
    assert [one for one in found if not 0 <= one["shared"] <= one["most"]] == []
