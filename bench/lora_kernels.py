"""The LoRA kernels alone on one GPU: all layers of a step in a CUDA graph.

    python -m bench.lora_kernels [--only small|large] [--out bench/results/lora_kernels.json]

Llama-3.1-8B's dimensions, seven modules, bf16, truly distinct random adapters in scattered pages of one arena. First
every workload is held against the reference, then timed: median of graph replays, y and x resident. The limit of a
decode step is the bytes of the adapters in it over the read bandwidth measured in the same run; of a prefill step,
those and the rows of x and y. `bench/lora_sweep.py` measures the same with the best block sizes that it finds.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch

from bench.common import environment, finish, read_bandwidth, say
from multilora.batch import LoraSegment
from multilora.layers.triton_ops import silu_and_mul
from multilora.lora.panels import AdapterShape, PanelGeometry, make_layout
from multilora.lora.reference import ReferenceLora
from multilora.lora.sites import LoraSite, LoraSlice
from multilora.lora.table import LoraTable
from multilora.lora.triton_backend import TritonLora
from multilora.lora.tuning import CSGMV, GRAPH_ROWS, Tuning

HIDDEN, KV, INTER, LAYERS = 4096, 1024, 14336, 32
PAGE_BYTES = 2 << 20
DTYPE = torch.bfloat16
ACCURACY = 1e-2
GATED = "gate_up_proj"


Shape = tuple[str, int, tuple[tuple[str, int], ...]]
"""Name, inputs, and the modules of a site with their outputs."""

LLAMA: tuple[Shape, ...] = (
    ("qkv_proj", HIDDEN, (("q_proj", HIDDEN), ("k_proj", KV), ("v_proj", KV))),
    ("o_proj", HIDDEN, (("o_proj", HIDDEN),)),
    ("gate_up_proj", HIDDEN, (("gate_proj", INTER), ("up_proj", INTER))),
    ("down_proj", INTER, (("down_proj", HIDDEN),)),
)


def llama_sites(layers: int = LAYERS, shapes: tuple[Shape, ...] = LLAMA) -> tuple[LoraSite, ...]:
    sites = []
    for layer in range(layers):
        for name, width, parts in shapes:
            offsets = [sum(n for _, n in parts[:i]) for i in range(len(parts))]
            slices = tuple(LoraSlice(module, at, n) for (module, n), at in zip(parts, offsets, strict=True))
            sites.append(LoraSite(len(sites), layer, name, width, slices))
    return tuple(sites)


@dataclass(frozen=True)
class Workload:
    """Rows of one step. singles: slots of single rows, which come first; adapters: slots that share the other rows
    evenly."""

    name: str
    rows: int
    adapters: tuple[int, ...]
    singles: tuple[int, ...] = ()

    @property
    def segments(self) -> tuple[LoraSegment, ...]:
        first = len(self.singles)
        each = (self.rows - first) // len(self.adapters)
        ranges = [(i, i + 1, p) for i, p in enumerate(self.singles)]
        ranges += [(first + i * each, first + (i + 1) * each, p) for i, p in enumerate(self.adapters)]
        return tuple(LoraSegment(start, end, (p,), (1.0,)) for start, end, p in ranges)

    @property
    def decode(self) -> bool:
        return self.rows <= GRAPH_ROWS


R16, MIXED = tuple(range(64)), tuple(range(64, 128))
RANKS = (*[16] * 64, *[8, 16, 32, 64] * 16)  # by slot
WORKLOADS = (
    Workload("64 rows, 64 distinct rank-16", 64, R16),
    Workload("32 rows, 32 distinct rank-16", 32, R16[:32]),
    Workload("8 rows, 8 distinct rank-16", 8, R16[:8]),
    Workload("1 row, one rank-16", 1, R16[:1]),
    Workload("64 rows, one rank-16", 64, R16[:1]),
    Workload("64 rows, 8 rank-16", 64, R16[:8]),
    Workload("64 rows, 16 rank-16", 64, R16[:16]),
    Workload("64 rows, 32 rank-16", 64, R16[:32]),
    Workload("64 rows, 64 distinct, ranks 8/16/32/64", 64, MIXED),
    Workload("128 rows, 64 distinct rank-16", 128, R16),
    Workload("256 rows, 64 distinct rank-16", 256, R16),
    Workload("128 rows, 128 distinct, ranks 8 to 64", 128, R16 + MIXED),
    Workload("256 rows, 64 distinct, ranks 8/16/32/64", 256, MIXED),
    Workload("128 rows, one rank-16", 128, R16[:1]),
    Workload("prefill 2048 rows, one rank-16", 2048, R16[:1]),
    Workload("prefill 2048 rows, 4 rank-16", 2048, R16[:4]),
    Workload("prefill 2048 rows, 64 rank-16", 2048, R16),
    Workload("mixed 2108 rows, 60 + 4 rank-16", 2108, R16[60:], R16[:60]),
    Workload("mixed 2108 rows, 60 + 4, ranks 8/16/32/64", 2108, MIXED[60:], MIXED[:60]),
)


@dataclass
class World:
    """An arena with adapters of these ranks, and rows to apply them to."""

    ranks: tuple[int, ...] = RANKS
    sites: tuple[LoraSite, ...] = field(default_factory=llama_sites)
    max_rows: int = 2108

    def __post_init__(self) -> None:
        geometry = PanelGeometry(PAGE_BYTES, DTYPE.itemsize)
        self.layouts = [
            make_layout(self.sites, AdapterShape(tuple(tuple(rank for _ in s.slices) for s in self.sites)), geometry)
            for rank in self.ranks
        ]
        pages = sum(layout.num_pages for layout in self.layouts)
        arena = torch.empty(pages, PAGE_BYTES, dtype=torch.uint8, device="cuda")
        arena.view(DTYPE).normal_(std=0.05)
        self.table = LoraTable(arena, DTYPE, tuple(tuple(s.offset for s in site.slices) for site in self.sites))
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
        for slot, layout in enumerate(self.layouts):
            self.table.install(slot, layout, [order.pop() for _ in range(layout.num_pages)])
        widths = {s.in_features for s in self.sites} | {s.out_features for s in self.sites}
        self.rows = {w: torch.randn(self.max_rows, w, device="cuda").to(DTYPE) for w in widths}
        self.out = {w: torch.zeros(self.max_rows, w, device="cuda", dtype=DTYPE) for w in widths}

    def limit_bytes(self, work: Workload) -> int:
        adapters = sum(self.layouts[slot].used_bytes for slot in {*work.adapters, *work.singles})
        if work.decode:
            return adapters
        columns = sum(s.in_features + (1.5 if s.name == GATED else 2) * s.out_features for s in self.sites)
        return adapters + int(columns * work.rows * DTYPE.itemsize)

    def step(self, backend: TritonLora, rows: int) -> None:
        """All sites once. Large steps include the activation of gate and up, which LoRA may be part of."""
        for site in self.sites:
            y, x = self.out[site.out_features][:rows], self.rows[site.in_features][:rows]
            if site.name == GATED and rows > GRAPH_ROWS:
                backend.apply_gated(y, x, site.index, silu_and_mul)
            else:
                backend.apply(y, x, site.index)

    def activate(self, rows: int) -> None:
        """The share of `step` that the base model does without LoRA: the activations."""
        for site in self.sites:
            if site.name == GATED:
                silu_and_mul(self.out[site.out_features][:rows])

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
            if site.name == GATED and not torch.equal(
                backend.apply_gated(y.clone(), x, site.index, silu_and_mul), silu_and_mul(got)
            ):
                return float("inf")
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


def host_ms(run: Callable[[], None], repeats: int = 5) -> float:
    """Median milliseconds that the host takes to launch everything."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = perf_counter()
        run()
        times.append((perf_counter() - start) * 1e3)
    return median(times)


def check(world: World, backend: TritonLora, works: Sequence[Workload]) -> dict[str, float]:
    """Every workload, and two with base rows, a composed row and a long segment, against the reference."""
    odd = (
        LoraSegment(1, 2, (0, 70, 65), (0.5, -1.0, 2.0)),
        LoraSegment(3, 4, (127,), (1.0,)),
        LoraSegment(4, 40, (66,), (0.25,)),
        LoraSegment(41, 60, (1, 2), (1.0, 1.0)),
    )
    cases = {w.name: (w.segments, w.rows) for w in works} | {
        f"base rows, composed rows, {n}": (odd, n) for n in (64, 300)
    }
    errors = {name: world.error(backend, *case) for name, case in cases.items()}
    for name, error in errors.items():
        if error > ACCURACY:
            raise SystemExit(f"{backend.name}: {name}: relative error {error}")
    return errors


def time_all(world: World, backend: TritonLora, bandwidth: float, works: Sequence[Workload]) -> list[dict[str, Any]]:
    rows = []
    for work in works:
        backend.prepare(work.segments, work.rows)
        ms = graph_ms(lambda work=work: world.step(backend, work.rows))
        limit = world.limit_bytes(work) / bandwidth * 1e3
        row = {"workload": work.name, "ms": round(ms, 3), "limit_ms": round(limit, 3)}
        line = f"  {work.name:<44}{ms:8.3f} ms   limit {limit:6.3f}   of limit {limit / ms:4.0%}"
        if not work.decode:
            activation = graph_ms(lambda work=work: world.activate(work.rows))
            host = host_ms(lambda work=work: world.step(backend, work.rows))
            row |= {"activation_ms": round(activation, 3), "host_ms": round(host, 3)}
            line += f"   activation alone {activation:6.3f}   host, eager {host:6.3f}"
        rows.append(row)
        say(line)
    return rows


def measure(
    out: str | None,
    result: dict[str, Any],
    world: World,
    bandwidth: float,
    best: Tuning | None = None,
    works: Sequence[Workload] = WORKLOADS,
) -> None:
    """Compare every variant with the reference, time it, and finish `result`. best: replaces the committed tuning."""
    tuning, small, large = best or CSGMV, [w for w in works if w.decode], [w for w in works if not w.decode]
    plain = replace(tuning, large=replace(tuning.large, gated=None))
    variants = {
        "csgmv": (TritonLora(world.table, world.sites, tuning=tuning), works),
        "csgmv, no early launch": (TritonLora(world.table, world.sites, tuning=tuning), small),
        "csgmv, expand, then the activation": (TritonLora(world.table, world.sites, tuning=plain), large),
        "csgmv, single rows as tiles": (
            TritonLora(world.table, world.sites, tuning=replace(tuning, singles_apart=False)),
            large,
        ),
        "triton": (TritonLora(world.table, world.sites, name="triton"), works),
    }
    variants["csgmv, no early launch"][0].overlap = False
    if best is not None:
        variants["csgmv, as committed"] = TritonLora(world.table, world.sites), works
    result["errors"], result["times"] = {}, {}
    for name, (backend, own) in variants.items():
        if own:
            result["errors"][name] = check(world, backend, own)
            say(f"{name}: largest relative error {max(result['errors'][name].values()):.1e}")
            result["times"][name] = time_all(world, backend, bandwidth, own)
    finish(result, out)


def begin(parser: argparse.ArgumentParser) -> tuple[dict[str, Any], float]:
    """The description of the machine that every result begins with, and the read bandwidth in bytes/s."""
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
    parser.add_argument("--only", choices=("small", "large"), help="steps of up to 256 rows, or larger ones")
    args = parser.parse_args()
    result, bandwidth = begin(parser)
    works = [w for w in WORKLOADS if args.only is None or w.decode == (args.only == "small")]
    measure(args.out, result, World(), bandwidth, works=works)


if __name__ == "__main__":
    main()
