"""The LoRA kernels alone on one GPU: all layers of a step in a CUDA graph.

    python -m bench.lora_kernels [--out bench/results/lora_kernels.json]

Llama-3.1-8B's dimensions, seven modules, bf16, truly distinct random adapters in scattered pages of one arena. First
every workload is held against the reference, then timed: median of graph replays, y and x resident. The limit of a
decode step is the bytes of the adapters in it over the read bandwidth measured in the same run; of a prefill step,
those and the rows of x and y. `bench/lora_sweep.py` measures the same with the best block sizes that it finds.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from bench.common import environment, finish, read_bandwidth, say
from multilora.batch import LoraSegment
from multilora.lora.panels import AdapterShape, PanelGeometry, place_panels
from multilora.lora.reference import ReferenceLora
from multilora.lora.sites import LoraSite, LoraSlice
from multilora.lora.table import LoraTable
from multilora.lora.triton_backend import TritonLora
from multilora.lora.tuning import Tuning

HIDDEN, KV, INTER, LAYERS = 4096, 1024, 14336, 32
PAGE_BYTES = 2 << 20
DTYPE = torch.bfloat16
ACCURACY = 1e-2


def llama_sites(layers: int = LAYERS) -> tuple[LoraSite, ...]:
    shapes = (
        ("qkv_proj", HIDDEN, (("q_proj", HIDDEN), ("k_proj", KV), ("v_proj", KV))),
        ("o_proj", HIDDEN, (("o_proj", HIDDEN),)),
        ("gate_up_proj", HIDDEN, (("gate_proj", INTER), ("up_proj", INTER))),
        ("down_proj", INTER, (("down_proj", HIDDEN),)),
    )
    sites = []
    for layer in range(layers):
        for name, width, parts in shapes:
            offsets = [sum(n for _, n in parts[:i]) for i in range(len(parts))]
            slices = tuple(LoraSlice(module, at, n) for (module, n), at in zip(parts, offsets, strict=True))
            sites.append(LoraSite(len(sites), layer, name, width, slices))
    return tuple(sites)


@dataclass(frozen=True)
class Workload:
    """adapters: the place of each segment, or None; `rows` are shared out evenly."""

    name: str
    rows: int
    adapters: tuple[int, ...]

    @property
    def segments(self) -> tuple[LoraSegment, ...]:
        each = self.rows // len(self.adapters)
        return tuple(LoraSegment(i * each, (i + 1) * each, (p,), (1.0,)) for i, p in enumerate(self.adapters))

    @property
    def decode(self) -> bool:
        return self.rows <= 256


R16, MIXED = tuple(range(64)), tuple(range(64, 128))
RANKS = (*[16] * 64, *[8, 16, 32, 64] * 16)  # by place
WORKLOADS = (
    Workload("64 rows, 64 distinct rank-16", 64, R16),
    Workload("32 rows, 32 distinct rank-16", 32, R16[:32]),
    Workload("8 rows, 8 distinct rank-16", 8, R16[:8]),
    Workload("1 row, one rank-16", 1, R16[:1]),
    Workload("64 rows, one rank-16", 64, R16[:1]),
    Workload("64 rows, 8 rank-16", 64, R16[:8]),
    Workload("64 rows, 64 distinct, ranks 8/16/32/64", 64, MIXED),
    Workload("prefill 2048 rows, one rank-16", 2048, R16[:1]),
    Workload("prefill 2048 rows, 4 rank-16", 2048, R16[:4]),
    Workload("prefill 2048 rows, 64 rank-16", 2048, R16),
)


@dataclass
class World:
    """An arena with adapters of these ranks, and rows to apply them to."""

    ranks: tuple[int, ...] = RANKS
    sites: tuple[LoraSite, ...] = field(default_factory=llama_sites)
    max_rows: int = 2048

    def __post_init__(self) -> None:
        geometry = PanelGeometry(PAGE_BYTES, DTYPE.itemsize)
        self.layouts = [
            place_panels(self.sites, AdapterShape(tuple(tuple(rank for _ in s.slices) for s in self.sites)), geometry)
            for rank in self.ranks
        ]
        pages = sum(layout.num_pages for layout in self.layouts)
        arena = torch.empty(pages, PAGE_BYTES, dtype=torch.uint8, device="cuda")
        arena.view(DTYPE).normal_(std=0.05)
        self.table = LoraTable(arena, DTYPE, tuple(tuple(s.offset for s in site.slices) for site in self.sites))
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
        for place, layout in enumerate(self.layouts):
            self.table.install(place, layout, [order.pop() for _ in range(layout.num_pages)])
        widths = {s.in_features for s in self.sites} | {s.out_features for s in self.sites}
        self.rows = {w: torch.randn(self.max_rows, w, device="cuda").to(DTYPE) for w in widths}
        self.out = {w: torch.zeros(self.max_rows, w, device="cuda", dtype=DTYPE) for w in widths}

    def limit_bytes(self, work: Workload) -> int:
        adapters = sum(self.layouts[place].used_bytes for place in set(work.adapters))
        moved = sum(s.in_features + 2 * s.out_features for s in self.sites) * work.rows * DTYPE.itemsize
        return adapters if work.decode else adapters + moved

    def step(self, backend: TritonLora, rows: int) -> None:
        for site in self.sites:
            backend.apply(self.out[site.out_features][:rows], self.rows[site.in_features][:rows], site.index)

    def error(self, backend: TritonLora, segments: tuple[LoraSegment, ...], rows: int) -> float:
        """The largest relative error at the first and last layer's sites; NaN counts as infinite."""
        reference, worst = ReferenceLora(self.table), 0.0
        backend.prepare(segments, rows)
        reference.prepare(segments, rows)
        for site in (*self.sites[:4], *self.sites[-4:]):
            x = torch.randn(rows, site.in_features, device="cuda").to(DTYPE)
            y = torch.randn(rows, site.out_features, device="cuda").to(DTYPE)
            got, want = y.clone(), y.float()
            backend.apply(got, x, site.index)
            reference.apply(want, x, site.index)
            error = float((got.float() - want).norm() / (want - y.float()).norm())
            worst = max(worst, error if error == error else float("inf"))
        return worst


def graph_ms(run: Callable[[], None], repeats: int = 20) -> float:
    """Median milliseconds of one replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return events_ms(graph.replay, repeats)


def events_ms(run: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(3):
        run()
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def check(world: World, backend: TritonLora) -> dict[str, float]:
    """Every workload, and one with base rows, a composed row and a long segment, against the reference."""
    odd = (
        LoraSegment(1, 2, (0, 70, 65), (0.5, -1.0, 2.0)),
        LoraSegment(3, 4, (127,), (1.0,)),
        LoraSegment(4, 40, (66,), (0.25,)),
        LoraSegment(41, 60, (1, 2), (1.0, 1.0)),
    )
    cases = {w.name: (w.segments, w.rows) for w in WORKLOADS} | {"base rows, composed rows": (odd, 64)}
    errors = {name: world.error(backend, *case) for name, case in cases.items()}
    for name, error in errors.items():
        if error > ACCURACY:
            raise SystemExit(f"{backend.name}: {name}: relative error {error}")
    return errors


def time_all(world: World, backend: TritonLora, bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for work in WORKLOADS:
        backend.prepare(work.segments, work.rows)
        ms = graph_ms(lambda work=work: world.step(backend, work.rows))
        limit = world.limit_bytes(work) / bandwidth * 1e3
        rows.append({"workload": work.name, "ms": round(ms, 3), "limit_ms": round(limit, 3)})
        say(f"  {work.name:<44}{ms:8.3f} ms   limit {limit:6.3f}   of limit {limit / ms:4.0%}")
    return rows


def measure(out: str | None, result: dict[str, Any], world: World, bandwidth: float, best: Tuning | None) -> None:
    """Hold every variant against the reference, time it, and finish `result`. best: instead of what is committed."""
    variants = {
        "csgmv": TritonLora(world.table, world.sites, tuning=best),
        "csgmv, chunk 16": TritonLora(world.table, world.sites, tuning=best, chunk_rows=16),
        "csgmv, no overlap": TritonLora(world.table, world.sites, tuning=best),
        "triton": TritonLora(world.table, world.sites, name="triton"),
    }
    variants["csgmv, no overlap"].overlap = False
    if best is not None:
        variants["csgmv, as committed"] = TritonLora(world.table, world.sites)
    result["errors"], result["times"] = {}, {}
    for name, backend in variants.items():
        result["errors"][name] = check(world, backend)
        say(f"{name}: largest relative error {max(result['errors'][name].values()):.1e}")
        result["times"][name] = time_all(world, backend, bandwidth)
    finish(result, out)


def begin(parser: argparse.ArgumentParser) -> tuple[dict[str, Any], float]:
    """What every result says of where it was measured, and the read bandwidth in bytes/s."""
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    result: dict[str, Any] = environment("triton")
    bandwidth = read_bandwidth(torch.device("cuda"), 1 << 32)
    result["read_bandwidth_tb_s"] = bandwidth / 1e12
    say(f"read bandwidth {bandwidth / 1e12:.2f} TB/s")
    return result, bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    result, bandwidth = begin(parser)
    measure(args.out, result, World(), bandwidth, None)


if __name__ == "__main__":
    main()
