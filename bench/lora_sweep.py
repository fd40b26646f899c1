"""Tries block sizes of the LoRA kernels: each half of each site by itself, all layers of it in one graph.

Called by `bench/lora_kernels.py --sweep`. Kernels are compiled first, by one process per core, into Triton's cache:

    python -m bench.lora_sweep SHARE OF
"""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

from bench.common import say
from bench.lora_kernels import WORKLOADS, Workload, World, graph_ms, llama_sites
from multilora.batch import LoraSegment
from multilora.lora.triton_backend import TritonLora
from multilora.lora.tuning import CSGMV, WIDE, ExpandBlocks, Phase, ShrinkBlocks, Tuning

SHRINK = [
    ShrinkBlocks(k=k, warps=w)
    for k, w in [(256, 1), (256, 2), (256, 4), (512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8)]
]
EXPAND = [
    ExpandBlocks(n=n, warps=w) for n, w in [(256, 1), (256, 2), (512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8)]
]
EXPAND += [replace(EXPAND[2], registers=128), replace(EXPAND[4], registers=128)]
LARGE_SHRINK = [
    ShrinkBlocks(k=k, warps=4, tile_k=tile_k, tile_r=tile_r)
    for k, tile_k, tile_r in [(1024, 128, 16), (2048, 128, 32), (4096, 64, 64), (4096, 128, 64), (4096, 128, 16)]
]
LARGE_EXPAND = [
    ExpandBlocks(n=n, warps=w, tile_n=t) for n, w, t in [(128, 4, 128), (256, 4, 256), (256, 8, 256), (512, 4, 128)]
]
CHUNKS = (16, 64)
DECODE = [w for w in WORKLOADS if w.decode]
PREFILL = [w for w in WORKLOADS if not w.decode]
OPTIONS: dict[tuple[str, bool], list] = {
    ("shrink", True): SHRINK,
    ("expand", True): EXPAND,
    ("shrink", False): LARGE_SHRINK,
    ("expand", False): LARGE_EXPAND,
}


def one(shrink: ShrinkBlocks, expand: ExpandBlocks) -> Tuning:
    phase = Phase(shrink, shrink, expand, expand)
    return Tuning(small=phase, large=phase)


def candidates() -> list[tuple[Tuning, int, bool]]:
    """(tuning, chunk rows, prefill): what has to be compiled."""
    small = [(one(CSGMV.small.narrow_shrink, e), 16, False) for e in EXPAND]
    small += [(one(s, CSGMV.small.narrow_expand), 16, False) for s in SHRINK]
    large = [(one(s, e), m, True) for m in CHUNKS for s in LARGE_SHRINK[:1] for e in LARGE_EXPAND]
    large += [(one(s, e), m, True) for m in CHUNKS for s in LARGE_SHRINK for e in LARGE_EXPAND[:1]]
    return small + large


def compile_all() -> None:
    cores = len(os.sched_getaffinity(0))
    workers = [subprocess.Popen([sys.executable, "-m", "bench.lora_sweep", str(i), str(cores)]) for i in range(cores)]
    failed = sum(worker.wait() != 0 for worker in workers)
    say(f"compiled {len(candidates())} candidates, {failed} workers failed")


def compile_share(share: int, of: int) -> None:
    world = World(ranks=(16,), sites=llama_sites(4), max_rows=300)
    for tuning, chunk, prefill in candidates()[share::of]:
        backend = TritonLora(world.table, world.sites, tuning=tuning, chunk_rows=chunk)
        rows = 300 if prefill else 16
        backend.prepare((LoraSegment(0, rows, (0,), (1.0,)),), rows)
        for site in world.sites[:4]:
            backend.apply(world.out[site.out_features][:rows], world.rows[site.in_features][:rows], site.index)


def sweep(world: World) -> tuple[Tuning, list[dict[str, Any]]]:
    """The best tuning found (by the mean of its times over the best times) and every time, in ms a step."""
    found: list[dict[str, Any]] = []
    best: dict[tuple, Any] = {}
    for chunk in CHUNKS:
        backend = TritonLora(world.table, world.sites, chunk_rows=chunk)
        for works in (DECODE, PREFILL) if chunk == CHUNKS[0] else (PREFILL,):
            decode = works is DECODE
            for half in ("shrink", "expand"):
                options: list = OPTIONS[half, decode]
                for wide in (False, True):
                    times = [time_half(world, backend, half, wide, blocks, works) for blocks in options]
                    name = f"{'decode' if decode else 'prefill'} {half} {'wide' if wide else 'narrow'} chunk {chunk}"
                    found += [record(name, b, t, works) for b, t in zip(options, times, strict=True)]
                    best.setdefault((decode, half, wide), options[best_of(times)])
    phases = [
        Phase(*(best[decode, h, w] for h in ("shrink", "expand") for w in (False, True))) for decode in (True, False)
    ]
    for phase in phases:
        say(f"best: {phase}")
    return Tuning(*phases), found


def time_half(
    world: World, backend: TritonLora, half: str, wide: bool, blocks: Any, works: list[Workload]
) -> list[float]:
    """Milliseconds of this half of all sites that are wide (or not), of each workload."""
    default = CSGMV.small if works is DECODE else CSGMV.large
    backend.tuning = one(blocks, default.narrow_expand) if half == "shrink" else one(default.narrow_shrink, blocks)
    rows = world.rows if half == "shrink" else world.out
    widths = [s.in_features if half == "shrink" else s.out_features for s in world.sites]
    chosen = [(site.index, w) for site, w in zip(world.sites, widths, strict=True) if (w >= WIDE) == wide]
    times = []
    for work in works:
        backend.prepare(work.segments, work.rows)

        def run(n: int = work.rows) -> None:
            for site, width in chosen:
                getattr(backend, half)(rows[width][:n], site)

        times.append(graph_ms(run, 7))
    return times


def best_of(times: list[list[float]]) -> int:
    floors = [min(column) for column in zip(*times, strict=True)]
    scores = [sum(t / floor for t, floor in zip(row, floors, strict=True)) for row in times]
    return scores.index(min(scores))


def record(name: str, blocks: Any, times: list[float], works: list[Workload]) -> dict[str, Any]:
    sizes = {key: value for key, value in asdict(blocks).items() if value is not None}
    say(f"{name:<32}{' '.join(f'{k}={v}' for k, v in sizes.items()):<56}{' '.join(f'{t:7.3f}' for t in times)}")
    return {"what": name, "blocks": sizes, "ms": {w.name: round(t, 4) for w, t in zip(works, times, strict=True)}}


if __name__ == "__main__":
    compile_share(int(sys.argv[1]), int(sys.argv[2]))
