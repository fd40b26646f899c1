"""Gate and up expanded inside their activation: to the bit what the two give one after the other, for every row."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from lora_world import DEVICE, INTERPRETED_SLOW, TOLERANCE, World, same_rank, segments_of

from multilora.batch import LoraSegment
from multilora.layers.triton_ops import silu_and_mul
from multilora.lora.panels import ScaleShift
from multilora.lora.sites import LoraSite, LoraSlice
from multilora.lora.triton_backend import TritonLora
from multilora.lora.triton_gated import gated_kernel
from multilora.lora.triton_kernels import expand_kernel, shrink_kernel
from multilora.lora.tuning import TRITON

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":  # the interpreter's bf16 dot is wrong
    DTYPES.append(torch.bfloat16)
PAIR = int(ScaleShift.DORA | ScaleShift.BIAS)


def make_sites(hidden: int, width: int) -> tuple[LoraSite, ...]:
    return (
        LoraSite(
            0, 0, "gate_up_proj", hidden, (LoraSlice("gate_proj", 0, width), LoraSlice("up_proj", width, width))
        ),
    )


def rows_of(world: World, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    site, g = world.sites[0], torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, site.in_features, generator=g).to(DEVICE, world.dtype)
    return x, torch.randn(num_rows, site.out_features, generator=g).to(DEVICE, world.dtype)


def check(
    world: World, segments: tuple[LoraSegment, ...], num_rows: int, *, captured: bool = False, **options: int
) -> None:
    """Against expand, then the activation; and against the reference."""
    backend = world.backend(graph_rows=4, **options)
    x, y = rows_of(world, num_rows)
    for lora in (backend, world.reference):
        lora.prepare(segments, num_rows, captured=captured)
    apart, together, exact = y.clone(), y.clone(), y.float()
    backend.apply(apart, x, 0)
    assert not torch.equal(apart, y)
    got = backend.apply_gated(together, x, 0, refuse)
    assert torch.equal(got, silu_and_mul(apart))
    want = world.reference.apply_gated(exact, x.float(), 0, lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1])
    assert (got.float() - want).norm() / want.norm() < TOLERANCE[world.dtype]


def refuse(y: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the activation is part of the kernel")


SHAPES = {"round": (64, 48, 65536), "odd": (40, 42, 65536), "cut panels": (64, 48, 512), "odd, cut": (40, 42, 512)}
KINDS = [
    pytest.param(shape, dtype, marks=() if i == 3 else INTERPRETED_SLOW)
    for i, shape in enumerate(SHAPES)
    for dtype in (DTYPES if len(DTYPES) > 2 else [DTYPES[i % 2]])
]


@pytest.mark.parametrize(("shape", "dtype"), KINDS)
def test_mixed_ranks_single_rows_and_base_rows(shape, dtype):
    """Ranks above and below those of one tl.dot; segments longer than a tile; gaps of several lengths."""
    hidden, width, page_bytes = SHAPES[shape]
    sites = make_sites(hidden, width)
    world = World(sites, [same_rank(sites, rank) for rank in (8, 20, 64)], dtype=dtype, page_bytes=page_bytes)
    for slot in range(3):
        world.install(slot)
    check(world, segments_of((1, 2, 0), (2, 3, 1), (5, 24, 2), (24, 25, 2), (27, 29, 0)), 46, chunk_rows=16)


@pytest.mark.parametrize(
    "page_bytes", [1024, pytest.param(65536, marks=INTERPRETED_SLOW)], ids=["cut panels", "whole panels"]
)
def test_one_slice_neither_and_scale_shift_pairs(page_bytes):
    sites = make_sites(40, 42)
    ranks = [((8, 0),), ((0, 20),), ((0, 0),), ((8, 8),), ((0, 16),)]
    scale_shift = [(), (), ((PAIR, 0),), ((PAIR, PAIR),), ((PAIR, 0),)]
    world = World(sites, ranks, scale_shift=scale_shift, page_bytes=page_bytes)
    for slot in range(5):
        world.install(slot)
    singles = [(i, i + 1, i) for i in range(5)]
    check(world, segments_of(*singles, *((6 + 3 * i, 9 + 3 * i, i) for i in range(5))), 22)


def test_composed_rows():
    sites = make_sites(64, 48)
    world = World(sites, [((4, 0),), ((0, 40),), ((16, 16),)])
    for slot in range(3):
        world.install(slot)
    segments = (
        LoraSegment(0, 1, (1, 2, 0), (0.7, -0.3, 1.1)),
        LoraSegment(1, 2, (2,), (2.0,)),
        LoraSegment(3, 9, (2, 1), (1.0, 2.0)),
        LoraSegment(9, 12, (0,), (0.5,)),
    )
    check(world, segments, 12)


def test_captured(monkeypatch):
    """Tables with room for more tiles than there are; and no adapter of several rows at all."""
    for name in ("CAPTURED_SEGMENTS", "CAPTURED_SINGLES"):
        monkeypatch.setattr(f"multilora.lora.triton_steps.{name}", 3)
    monkeypatch.setattr("multilora.lora.triton_backend.CAPTURED_SINGLES", 3)
    sites = make_sites(64, 48)
    world = World(sites, [same_rank(sites, rank) for rank in (8, 20)])
    for slot in range(2):
        world.install(slot)
    for segments in (segments_of((1, 2, 0), (5, 24, 1), (26, 28, 0)), segments_of((3, 4, 1))):
        check(world, segments, 40, captured=True, chunk_rows=16)


@pytest.mark.slow
def test_more_tiles_than_the_table_of_a_captured_step_has(monkeypatch):
    """Many short segments, or tiles of base rows behind them: such a step is launched by itself, and is right."""
    for name in ("CAPTURED_SEGMENTS", "CAPTURED_SINGLES"):
        monkeypatch.setattr(f"multilora.lora.triton_steps.{name}", 2)
    monkeypatch.setattr("multilora.lora.triton_backend.CAPTURED_SINGLES", 2)
    sites = make_sites(64, 48)
    world = World(sites, [same_rank(sites, rank) for rank in (8, 20)])
    for slot in range(2):
        world.install(slot)
    short = [
        (3 * i, 3 * i + 2, i % 2) for i in range(4)
    ]  # four tiles and gaps, where there is room for 4 + 3 of both
    for segments, fits in ((segments_of(*short[:2]), True), (segments_of(*short), False)):
        backend = world.backend(graph_rows=4, chunk_rows=16)
        backend.prepare(segments, 40, captured=True)
        assert backend.replayable == fits
        check(world, segments, 40, captured=True, chunk_rows=16)


def test_one_adapter_on_all_rows():
    """No base row is left to list."""
    sites = make_sites(64, 48)
    world = World(sites, [same_rank(sites, 8)])
    world.install(0)
    check(world, segments_of((0, 12, 0)), 12)


def test_what_is_launched(monkeypatch):
    """The fused kernel only in large steps whose adapters of several rows touch the site; else the plain way."""
    sites = make_sites(64, 48)
    world = World(sites, [same_rank(sites, 8), ((0, 0),)])
    for slot in range(2):
        world.install(slot)
    launched: list[object] = []
    monkeypatch.setattr("multilora.kernels.triton_launch.launch", lambda kernel, *_, **__: launched.append(kernel))

    def launches(segments, rows, backend):
        launched.clear()
        backend.prepare(segments, rows)
        x, y = rows_of(world, rows)
        backend.apply_gated(y, x, 0, lambda y: launched.append("activation"))
        return list(launched)

    backend, plain = world.backend(graph_rows=4), [shrink_kernel, expand_kernel, "activation"]
    one, many = segments_of((0, 1, 0)), segments_of((0, 3, 0))
    assert launches(many, 8, backend) == [shrink_kernel, gated_kernel]
    assert launches(many, 4, backend) == plain
    assert launches(one, 8, backend) == plain
    assert launches(segments_of((0, 1, 0), (1, 5, 0)), 8, backend) == [
        shrink_kernel,
        shrink_kernel,
        expand_kernel,
        gated_kernel,
    ]
    assert launches(segments_of((0, 1, 0), (1, 5, 1)), 8, backend) == plain
    assert launches(segments_of((0, 5, 1)), 8, backend) == ["activation"]
    assert launches(many, 8, TritonLora(world.table, sites, name="triton", tuning=TRITON, graph_rows=4)) == plain


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("decodes", [0, 60])
def test_as_the_engine_runs_it(decodes, captured):
    """The committed block sizes, bf16, widths of a real model, prompts beside decodes."""
    sites = make_sites(1024, 3584)
    ranks = [same_rank(sites, (8, 16, 32, 64)[i % 4]) for i in range(60)]
    world = World(sites, ranks, dtype=torch.bfloat16, page_bytes=1 << 20)
    for slot in range(60):
        world.install(slot)
    backend = TritonLora(world.table, sites)
    prompts = [(decodes + i * 200, decodes + i * 200 + 170, i) for i in range(4)]
    segments = segments_of(*((i, i + 1, i) for i in range(decodes)), *prompts)
    num_rows = decodes + 4 * 200
    x, y = rows_of(world, num_rows)
    backend.prepare(segments, num_rows, captured=captured)
    assert backend.replayable == captured
    apart = y.clone()
    backend.apply(apart, x, 0)
    got = backend.apply_gated(y.clone(), x, 0, refuse)
    assert torch.equal(got, silu_and_mul(apart))
    world.reference.prepare(segments, num_rows)
    want = y.float()
    world.reference.apply(want, x.float(), 0)
    assert (apart.float() - want).norm() / want.norm() < TOLERANCE[torch.bfloat16]
